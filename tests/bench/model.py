"""Tokens a second of both scripts' models beside other people's of the same weights.

    python tests/bench/model.py                       # with transformers' Mamba: six minutes
    python tests/bench/model.py --skip-transformers   # without transformers' Mamba: two minutes
    python tests/bench/model.py --malloc tuned --skip-transformers
    python tests/bench/model.py --folder SmolLM2-135M # a real Llama alone: writes folder.json

mamba.py stands beside mambapy's and transformers' Mamba (4 layers, heads not tied, as mambapy's are
not), and transformer.py beside transformers' Llama (2 layers, tied: as many parameters as a tied
Mamba of 4). One process, interleaved, float32. A training step is forward pass, cross-entropy,
backward pass and AdamW; ours takes the loss as its script does. Generation is greedy, and all must
write the same tokens. A model whose weights do not fit the cache reads each of them once a token,
so that the memory's bandwidth sets a floor; `python -m tests.peers.test_smollm FOLDER` writes one.
"""

import argparse
import sys
from collections.abc import Callable

import _common  # first: torch's threads read what it sets
from _common import goal, interleave, measure, median, number, spread, table

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamba
import transformer

FULL = {"width": 256, "layers": 4, "vocab": 4096, "batch": 4, "length": 512, "generated": 200}
QUICK = {"width": 32, "layers": 2, "vocab": 64, "batch": 2, "length": 32, "generated": 10}
PROMPT = 8  # tokens
NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # nothing stops early
GOALS = {("training", "mambapy"): 5.5, ("generation", "mambapy"): 1.3}
GOALS |= {("training", "transformers"): 200.0}
GOALS |= {("training", "Llama"): 1.1, ("generation", "Llama"): 1.5}
FOLDER_GOAL = 1.2  # generation, transformer.py over transformers' Llama, a model in a folder
PAIR_GOAL = 0.75  # training, mamba.py over transformer.py at equal parameters


def our_model(sizes: dict[str, int]) -> mamba.Mamba:
    config = {"d_model": sizes["width"], "n_layer": sizes["layers"], "vocab_size": sizes["vocab"]}
    return mamba.Mamba(mamba.MambaConfig(**config, tie_embeddings=False))


def mambapy_model(sizes: dict[str, int]) -> nn.Module:
    """mambapy's layers and norm as its language model has them; that module needs einops."""
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Mamba(MambaConfig(d_model=sizes["width"], n_layers=sizes["layers"]))
            self.backbone.embeddings = nn.Embedding(sizes["vocab"], sizes["width"])
            self.backbone.norm_f = RMSNorm(sizes["width"])
            self.lm_head = nn.Linear(sizes["width"], sizes["vocab"], bias=False)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.backbone(self.backbone.embeddings(tokens))
            return self.lm_head(self.backbone.norm_f(x))

        @torch.inference_mode()
        def generate(self, tokens: Tensor, new: int) -> Tensor:
            """As mambapy's own generate: the prompt too goes in token by token."""
            config, tokens = self.backbone.config, list(tokens.unbind(1))
            window = torch.zeros(len(tokens[0]), config.d_inner, config.d_conv - 1)
            caches: list = [(None, window) for _ in range(config.n_layers)]
            prompt = len(tokens)
            for i in range(prompt + new - 1):
                x, caches = self.backbone.step(self.backbone.embeddings(tokens[i]), caches)
                if i + 1 >= prompt:
                    tokens.append(self.lm_head(self.backbone.norm_f(x)).argmax(-1))
            return torch.stack(tokens, dim=1)

    return Model()


def transformers_model(sizes: dict[str, int]) -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    config = {"hidden_size": sizes["width"], "num_hidden_layers": sizes["layers"]}
    config |= {"vocab_size": sizes["vocab"], "tie_word_embeddings": False}
    return MambaForCausalLM(MambaConfig(**config, **NO_IDS))


def make_models(sizes: dict[str, int], peers: list[str]) -> dict[str, nn.Module]:
    """The models with the weights of ours; mambapy's and transformers' have our names here."""
    models = {"ours": our_model(sizes)}
    nn.init.normal_(
        models["ours"].backbone.embeddings.weight
    )  # a text that does not repeat one token
    for name in peers:
        make = mambapy_model if name == "mambapy" else transformers_model
        models[name] = make(sizes)
        models[name].load_state_dict(models["ours"].state_dict())
    return models


def make_transformers(sizes: dict[str, int]) -> dict[str, nn.Module]:
    """transformer.py's model and transformers' Llama with the same weights, and names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, heads = max(1, sizes["layers"] // 2), max(1, sizes["width"] // 64)
    config = {"d_model": sizes["width"], "n_layer": layers, "n_head": heads}
    config["vocab_size"] = sizes["vocab"]
    ours = transformer.Transformer(transformer.TransformerConfig(**config))
    nn.init.normal_(ours.model.embed_tokens.weight)  # a text that does not repeat one token
    theirs = {"hidden_size": sizes["width"], "num_hidden_layers": layers, "rms_norm_eps": 1e-5}
    theirs |= {"num_attention_heads": heads, "vocab_size": sizes["vocab"]}
    theirs |= {"intermediate_size": ours.config.hidden, "tie_word_embeddings": True}
    llama = LlamaForCausalLM(LlamaConfig(**theirs, **NO_IDS))
    llama.load_state_dict(ours.state_dict())
    return {"ours": ours, "Llama": llama}


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    output = model(tokens)
    return output if isinstance(output, Tensor) else output.logits


def training_step(model: nn.Module, tokens: Tensor) -> Callable[[], float]:
    """A call that takes one step of AdamW on `tokens` (B, L + 1) and returns the loss before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        x, y = tokens[:, :-1], tokens[:, 1:]
        if isinstance(model, mamba.Mamba | transformer.Transformer):
            loss = model(x, targets=y)
        else:
            loss = F.cross_entropy(logits_of(model, x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def generation(name: str, model: nn.Module, prompt: Tensor, new: int) -> Callable[[], Tensor]:
    """A call that writes `new` tokens after the prompt, each the likeliest."""
    if name == "ours":
        return lambda: model.generate(prompt, new, temperature=0)
    if name == "mambapy":
        return lambda: model.generate(prompt, new)
    mask = torch.ones_like(prompt)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": new}
    return lambda: model.generate(prompt, **options)


def time_generation(models: dict[str, nn.Module], sizes: dict, rounds: int) -> dict[str, list]:
    prompt, new = torch.randint(1, sizes["vocab"], (1, PROMPT)), sizes["generated"]
    runs = {name: generation(name, m.eval(), prompt, new) for name, m in models.items()}
    want = runs["ours"]()
    assert want.shape == (1, PROMPT + sizes["generated"])
    for name, run in runs.items():
        assert torch.equal(run(), want), f"{name} writes other tokens"
    return interleave(runs, rounds, budget=20.0)


def time_training(models: dict[str, nn.Module], sizes: dict, rounds: int) -> dict[str, list]:
    """Seconds a step. transformers' comes last, and once: its backward pass takes minutes."""
    tokens = torch.randint(1, sizes["vocab"], (sizes["batch"], sizes["length"] + 1))
    for model in models.values():  # training starts from small embeddings
        for embedding in (m for m in model.modules() if isinstance(m, nn.Embedding)):
            embedding.weight.data *= 0.02
    steps = {name: training_step(model.train(), tokens) for name, model in models.items()}
    with torch.no_grad():
        want = logits_of(models["ours"], tokens)
        errors = [(logits_of(model, tokens) - want).norm() for model in models.values()]
        error = max(errors) / want.norm()
    assert error <= 1e-4, f"the models differ: {error}"
    slow = steps.pop("transformers", None)
    times = interleave(steps, rounds, budget=60.0)
    return times | ({"transformers": [measure(slow)]} if slow else {})


def time_pair(sizes: dict[str, int], rounds: int) -> dict:
    """Training tokens a second of both scripts' models, Mamba with twice the layers.

    Their parameters are within a twentieth of each other.
    """
    config = {"d_model": sizes["width"], "vocab_size": sizes["vocab"]}
    layers, heads = max(1, sizes["layers"] // 2), max(1, sizes["width"] // 64)
    attention = {"n_layer": layers, "n_head": heads, "tie_embeddings": True} | config
    attention = transformer.Transformer(transformer.TransformerConfig(**attention))
    ours = mamba.Mamba(mamba.MambaConfig(n_layer=2 * layers, **config))
    models, pair = {"mamba.py": ours, "transformer.py": attention}, {}
    tokens = torch.randint(1, sizes["vocab"], (sizes["batch"], sizes["length"] + 1))
    steps = {name: training_step(model.train(), tokens) for name, model in models.items()}
    for name, seconds in interleave(steps, rounds, budget=60.0).items():
        count = sum(p.numel() for p in models[name].parameters())
        rate = sizes["batch"] * sizes["length"] / median(seconds)
        pair[name] = {"parameters": count, "tokens_a_second": rate, "seconds": seconds}
        print(f"training at equal parameters: {name}: {count:,}, {rate:,.0f} tokens/s")
    return pair


def bandwidth() -> float:
    """Bytes a second at which two gigabytes are read and added up, the best of ten times."""
    memory = torch.ones(2**29)
    return 4 * len(memory) / min(measure(memory.sum) for _ in range(10))


def measure_folder(folder: str, new: int, rounds: int) -> dict:
    """Tokens a second of a real model in Llama's layout, and what share that is of the floor's."""
    from transformers import LlamaForCausalLM

    models = {"ours": transformer.read_folder(folder)}
    models["Llama"] = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    models["Llama"].generation_config.eos_token_id = None  # nothing stops early
    size = 4 * sum(p.numel() for p in models["ours"].parameters())
    sizes = {"vocab": models["ours"].config.vocab_size, "generated": new}
    times, bytes_a_second = time_generation(models, sizes, rounds), bandwidth()
    rates = {name: new / median(seconds) for name, seconds in times.items()}
    ratio, share = rates["ours"] / rates["Llama"], rates["ours"] * size / bytes_a_second
    print(f"generation: {rates}, {ratio:.2f} times, {share:.0%} of {bytes_a_second / 1e9:.1f} GB/s")
    goals = [goal("generation of a real model over Llama's", ratio, FOLDER_GOAL)]
    result = {"tokens_a_second": rates, "ratio": ratio, "share_of_memory_floor": share}
    result |= {"weight_bytes": size, "bytes_a_second": bytes_a_second, "new_tokens": new}
    return result | {"seconds": times, "goals": goals}


def report(script: str, times: dict[str, dict[str, list]], tokens: dict[str, int]) -> list[dict]:
    """Print tokens a second and ratios; returns the rows."""
    rows, lines = [], [[script, "tokens a second", "spread", "runs", "ours is faster by"]]
    for job, of_model in times.items():
        for name, seconds in of_model.items():
            ratio = median(seconds) / median(of_model["ours"])
            rate, row = tokens[job] / median(seconds), {"script": script, "job": job, "model": name}
            rows.append(row | {"tokens_a_second": rate, "ratio": ratio, "seconds": seconds})
            line = [f"{job}, {name}", number(rate), f"±{spread(seconds):.0%}", str(len(seconds))]
            lines.append([*line, "" if name == "ours" else f"{number(ratio)} x"])
    print(table(lines))
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _common.add_common_flags(parser)
    parser.add_argument("--rounds", type=int, default=7, help="runs of each; the median counts")
    text = "leave transformers' Mamba out: its step takes minutes"
    parser.add_argument("--skip-transformers", action="store_true", help=text)
    parser.add_argument("--folder", help="only generation of the Llama in this folder")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    _common.need_peers()
    _common.prepare(args)
    sizes, rounds = (QUICK, 2) if args.quick else (FULL, args.rounds)
    if args.folder:
        measured = measure_folder(args.folder, 50, rounds)
        _common.write_result(args, "folder", **measured)
        return 0
    families = {"transformer.py": make_transformers(sizes)}
    peers = ["mambapy"] if args.skip_transformers else ["mambapy", "transformers"]
    families["mamba.py"] = make_models(sizes, peers)
    tokens = {"generation": sizes["generated"], "training": sizes["batch"] * sizes["length"]}
    rows, parameters, goals = [], {}, []
    for script, models in families.items():
        counts = {
            name: sum(p.numel() for p in model.parameters()) for name, model in models.items()
        }
        assert len(set(counts.values())) == 1, counts
        parameters[script] = counts["ours"]
        print(f"{script}: {counts['ours']:,} parameters, {args.threads} threads, {sizes}")
        times = {"generation": time_generation(models, sizes, rounds)}  # before weights change
        times["training"] = time_training(models, sizes, rounds)
        rows += report(script, times, tokens)
    for row in rows:
        at_least = GOALS.get((row["job"], row["model"]))
        if at_least and not args.quick:
            text = f"{row['job']}: tokens a second over {row['model']}'s"
            goals.append(goal(text, row["ratio"], at_least))
    pair = time_pair(sizes, 2 * rounds)
    if not args.quick:
        ratio = pair["mamba.py"]["tokens_a_second"] / pair["transformer.py"]["tokens_a_second"]
        text = "training: mamba.py's tokens a second over transformer.py's, equal parameters"
        goals.append(goal(text, ratio, PAIR_GOAL))
    measured = {"pair": pair, "sizes": sizes, "parameters": parameters, "measured": rows}
    _common.write_result(args, "model", **measured, goals=goals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
