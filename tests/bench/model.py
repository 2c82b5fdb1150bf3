"""Training and generation of both scripts' models beside other people's of the same weights, in tokens a second.

    python tests/bench/model.py                       # with one step of transformers' Mamba: about six minutes
    python tests/bench/model.py --skip-transformers   # without transformers' Mamba: two minutes
    python tests/bench/model.py --malloc tuned --skip-transformers

mamba.py stands beside mambapy's and transformers' Mamba (4 layers, heads not tied, as mambapy's are not), and
transformer.py beside transformers' Llama (2 layers, tied: as many parameters as a tied Mamba of 4). One process,
interleaved, float32. A training step is forward pass, cross-entropy, backward pass and AdamW; ours takes the loss as
its script does. Generation is greedy, and all must write the same tokens.
"""

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _common import (
    add_common_flags,
    goal,
    interleave,
    measure,
    median,
    need_peers,
    number,
    prepare,
    spread,
    table,
    write_result,
)
from torch import Tensor, nn

import mamba
import transformer

FULL = {"width": 256, "layers": 4, "vocab": 4096, "batch": 4, "length": 512, "generated": 200}
QUICK = {"width": 32, "layers": 2, "vocab": 64, "batch": 2, "length": 32, "generated": 10}
PROMPT = 8  # tokens
GOALS = {("training", "mambapy"): 5.5, ("training", "transformers"): 200.0, ("generation", "mambapy"): 3.0}
GOALS |= {("training", "Llama"): 1.15, ("generation", "Llama"): 3.0}


def our_model(sizes: dict[str, int]) -> mamba.Mamba:
    config = {"d_model": sizes["width"], "n_layer": sizes["layers"], "vocab_size": sizes["vocab"]}
    return mamba.Mamba(mamba.MambaConfig(**config, tie_embeddings=False))


def mambapy_model(sizes: dict[str, int]) -> nn.Module:
    """mambapy's layers and norm as its language model puts them together (that module needs einops, for Mamba-2)."""
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Mamba(MambaConfig(d_model=sizes["width"], n_layers=sizes["layers"]))
            self.backbone.embeddings = nn.Embedding(sizes["vocab"], sizes["width"])
            self.backbone.norm_f = RMSNorm(sizes["width"])
            self.lm_head = nn.Linear(sizes["width"], sizes["vocab"], bias=False)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.lm_head(self.backbone.norm_f(self.backbone(self.backbone.embeddings(tokens))))

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

    config = {"hidden_size": sizes["width"], "num_hidden_layers": sizes["layers"], "vocab_size": sizes["vocab"]}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # none: generation never stops early
    return MambaForCausalLM(MambaConfig(**config, **ids, tie_word_embeddings=False))


def make_models(sizes: dict[str, int], peers: list[str]) -> dict[str, nn.Module]:
    """The models with the weights of ours; mambapy's and transformers' parameters have our names here."""
    models = {"ours": our_model(sizes)}
    nn.init.normal_(models["ours"].backbone.embeddings.weight)  # a text that does not repeat one token
    for name in peers:
        models[name] = mambapy_model(sizes) if name == "mambapy" else transformers_model(sizes)
        models[name].load_state_dict(models["ours"].state_dict())
    return models


def make_transformers(sizes: dict[str, int]) -> dict[str, nn.Module]:
    """transformer.py's model and transformers' Llama with the same weights, and names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, heads = max(1, sizes["layers"] // 2), max(1, sizes["width"] // 64)
    config = {"d_model": sizes["width"], "n_layer": layers, "n_head": heads, "vocab_size": sizes["vocab"]}
    ours = transformer.Transformer(transformer.TransformerConfig(**config))
    nn.init.normal_(ours.model.embed_tokens.weight)  # a text that does not repeat one token
    theirs = {"hidden_size": sizes["width"], "num_hidden_layers": layers, "num_attention_heads": heads}
    theirs |= {"vocab_size": sizes["vocab"], "intermediate_size": ours.config.hidden, "rms_norm_eps": 1e-5}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # none: generation never stops early
    llama = LlamaForCausalLM(LlamaConfig(**theirs, **ids, tie_word_embeddings=True))
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
        ours = isinstance(model, mamba.Mamba | transformer.Transformer)
        loss = model(x, targets=y) if ours else F.cross_entropy(logits_of(model, x).flatten(0, 1), y.flatten())
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
    return lambda: model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=new)


def time_generation(models: dict[str, nn.Module], sizes: dict[str, int], rounds: int) -> dict[str, list[float]]:
    prompt = torch.randint(1, sizes["vocab"], (1, PROMPT))
    runs = {name: generation(name, model.eval(), prompt, sizes["generated"]) for name, model in models.items()}
    want = runs["ours"]()
    assert want.shape == (1, PROMPT + sizes["generated"])
    for name, run in runs.items():
        assert torch.equal(run(), want), f"{name} writes other tokens"
    return interleave(runs, rounds, budget=20.0)


def time_training(models: dict[str, nn.Module], sizes: dict[str, int], rounds: int) -> dict[str, list[float]]:
    """Seconds a step. transformers' comes after the others, and once: its backward pass takes minutes."""
    tokens = torch.randint(1, sizes["vocab"], (sizes["batch"], sizes["length"] + 1))
    for model in models.values():  # training starts from small embeddings, not from those of a varied text
        for embedding in (m for m in model.modules() if isinstance(m, nn.Embedding)):
            embedding.weight.data *= 0.02
    steps = {name: training_step(model.train(), tokens) for name, model in models.items()}
    with torch.no_grad():
        want = logits_of(models["ours"], tokens)
        error = max((logits_of(model, tokens) - want).norm() / want.norm() for model in models.values())
    assert error <= 1e-4, f"the models differ: {error}"
    slow = steps.pop("transformers", None)
    times = interleave(steps, rounds, budget=60.0)
    return times | ({"transformers": [measure(slow)]} if slow else {})


def time_pair(sizes: dict[str, int], rounds: int) -> dict:
    """Training tokens a second of both scripts' models, Mamba with twice the layers: parameters within a twentieth."""
    config = {"d_model": sizes["width"], "vocab_size": sizes["vocab"]}
    layers, heads = max(1, sizes["layers"] // 2), max(1, sizes["width"] // 64)
    attention = transformer.TransformerConfig(n_layer=layers, n_head=heads, tie_embeddings=True, **config)
    models = {"mamba.py": mamba.Mamba(mamba.MambaConfig(n_layer=2 * layers, **config))}
    models["transformer.py"] = transformer.Transformer(attention)
    tokens = torch.randint(1, sizes["vocab"], (sizes["batch"], sizes["length"] + 1))
    seconds = interleave({k: training_step(model.train(), tokens) for k, model in models.items()}, rounds, budget=60.0)
    pair = {k: {"parameters": sum(p.numel() for p in model.parameters())} for k, model in models.items()}
    for name, row in pair.items():
        row |= {"tokens_a_second": sizes["batch"] * sizes["length"] / median(seconds[name]), "seconds": seconds[name]}
        print(f"training at equal parameters: {name}: {row['parameters']:,}, {row['tokens_a_second']:,.0f} tokens/s")
    return pair


def report(script: str, times: dict[str, dict[str, list[float]]], tokens: dict[str, int]) -> list[dict]:
    """Print tokens a second and ratios; returns the rows."""
    rows, lines = [], [[script, "tokens a second", "spread", "runs", "ours is faster by"]]
    for job, of_model in times.items():
        for name, seconds in of_model.items():
            ratio = median(seconds) / median(of_model["ours"])
            row = {"script": script, "job": job, "model": name, "tokens_a_second": tokens[job] / median(seconds)}
            rows.append(row | {"ratio": ratio, "seconds": seconds})
            times_ = "" if name == "ours" else f"{number(ratio)} x"
            rate = number(row["tokens_a_second"])
            lines.append([f"{job}, {name}", rate, f"±{spread(seconds):.0%}", str(len(seconds)), times_])
    print(table(lines))
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = add_common_flags(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("--rounds", type=int, default=7, help="runs of each; the median counts")
    parser.add_argument(
        "--skip-transformers", action="store_true", help="leave transformers' Mamba out: its step takes minutes"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    need_peers()
    prepare(args)
    sizes, rounds = (QUICK, 2) if args.quick else (FULL, args.rounds)
    families = {"transformer.py": make_transformers(sizes)}
    families["mamba.py"] = make_models(sizes, ["mambapy"] if args.skip_transformers else ["mambapy", "transformers"])
    rows, parameters, goals = [], {}, []
    for script, models in families.items():
        counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        assert len(set(counts.values())) == 1, counts
        parameters[script] = counts["ours"]
        print(f"{script}: {counts['ours']:,} parameters, {args.threads} threads, {args.malloc} malloc; {sizes}")
        times = {"generation": time_generation(models, sizes, rounds)}  # first: training changes the weights
        times["training"] = time_training(models, sizes, rounds)
        rows += report(script, times, {"generation": sizes["generated"], "training": sizes["batch"] * sizes["length"]})
    for row in rows:
        at_least = GOALS.get((row["job"], row["model"]))
        if at_least and not args.quick:
            goals.append(goal(f"{row['job']}: tokens a second over {row['model']}'s", row["ratio"], at_least))
    pair = time_pair(sizes, 2 * rounds)
    if not args.quick:
        ratio = pair["mamba.py"]["tokens_a_second"] / pair["transformer.py"]["tokens_a_second"]
        goals.append(goal("training: mamba.py's tokens a second over transformer.py's, equal parameters", ratio, 0.8))
    write_result(args, "model", pair=pair, sizes=sizes, parameters=parameters, measured=rows, goals=goals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
