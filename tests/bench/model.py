"""Tokens a second of both scripts' models beside other people's of the same weights.

    python tests/bench/model.py --rounds 5            # two minutes
    python tests/bench/model.py --folder SmolLM2-135M # a real Llama alone: writes folder.json

mamba.py stands beside mambapy's Mamba (4 layers, heads not tied, as mambapy's are not), and
transformer.py beside transformers' Llama (2 layers, tied: as many parameters as a tied Mamba of
4). One process, interleaved, float32. A training step is forward pass, cross-entropy,
backward pass and AdamW; ours takes the loss as its script does. Generation is greedy, and all must
write the same tokens. A model whose weights do not fit the cache reads each of them once a token,
so that the memory's bandwidth sets a floor; `python -m tests.peers.test_smollm FOLDER` writes one.
"""

import functools
import itertools
from collections.abc import Callable

import _common  # first: torch's threads read what it sets
from _common import best_of, count, goal, interleave, median, print_rows

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamba
import transformer

FULL = {"width": 256, "layers": 4, "vocab": 4096, "batch": 4, "length": 512, "generated": 200}
SMOKE = {"width": 32, "layers": 2, "vocab": 64, "batch": 2, "length": 32, "generated": 10}
PROMPT = 8  # tokens
NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # nothing stops early
GOALS = {"mambapy": {"training": 5.5, "generation": 1.3}}  # tokens a second over the peer's
GOALS["Llama"] = {"training": 1.1, "generation": 1.5}
FOLDER_GOAL = 1.2  # generation, transformer.py over transformers' Llama, a model in a folder
PAIR_GOAL = 0.75  # training, mamba.py over transformer.py at equal parameters


# ----- The models


def our_models(sizes: dict[str, int], tied: bool) -> tuple[nn.Module, nn.Module]:
    """A Mamba, and a Transformer of half its layers; tied, their parameters are within 5 %."""
    width, layers, vocab = sizes["width"], sizes["layers"], sizes["vocab"]
    ours = mamba.MambaConfig(width, layers, vocab, tie_embeddings=tied)
    heads = max(1, width // 64)
    theirs = transformer.TransformerConfig(width, layers // 2, heads, vocab_size=vocab)
    return mamba.Mamba(ours), transformer.Transformer(theirs)


def mambapy_model(sizes: dict[str, int]) -> nn.Module:
    """mambapy's, as tests/peers has it, that writes too."""
    from mambapy.mamba import MambaConfig

    from tests.peers.test_mamba import MambapyModel

    class Model(MambapyModel):
        @torch.inference_mode()
        def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float) -> Tensor:
            """As mambapy's own generate, greedy: the prompt too goes in token by token."""
            config, tokens = self.backbone.config, list(tokens.unbind(1))
            window = torch.zeros(len(tokens[0]), config.d_inner, config.d_conv - 1)
            caches: list = [(None, window) for _ in range(config.n_layers)]
            prompt = len(tokens)
            for i in range(prompt + max_new_tokens - 1):
                x, caches = self.backbone.step(self.backbone.embeddings(tokens[i]), caches)
                if i + 1 >= prompt:
                    tokens.append(self.lm_head(self.backbone.norm_f(x)).argmax(-1))
            return torch.stack(tokens, dim=1)

    return Model(MambaConfig(d_model=sizes["width"], n_layers=sizes["layers"]), sizes["vocab"])


def llama_model(sizes: dict[str, int], ours: transformer.Transformer) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {"hidden_size": sizes["width"], "num_hidden_layers": ours.config.n_layer}
    config |= {"num_attention_heads": ours.config.n_head, "vocab_size": sizes["vocab"]}
    config |= {"intermediate_size": ours.config.hidden, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**config, rms_norm_eps=1e-5, **NO_IDS))


def make_families(sizes: dict[str, int]) -> dict[str, dict[str, nn.Module]]:
    """Each script's model and its peer, which has our names, with equal weights and logits."""
    ours, attention = our_models(sizes, tied=False)
    nn.init.normal_(attention.model.embed_tokens.weight)  # a text that does not repeat one token
    nn.init.normal_(ours.backbone.embeddings.weight)
    families = {"transformer.py": {"ours": attention, "Llama": llama_model(sizes, attention)}}
    families["mamba.py"] = {"ours": ours, "mambapy": mambapy_model(sizes)}
    for first, second in (models.values() for models in families.values()):
        second.load_state_dict(first.state_dict())
        tokens = torch.randint(sizes["vocab"], (2, sizes["length"]))
        with torch.no_grad():
            want, found = logits_of(first, tokens), logits_of(second, tokens)
        assert (found - want).norm() <= 1e-4 * want.norm()
    return families


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    output = model(tokens)
    return output if isinstance(output, Tensor) else output.logits


# ----- Generation and training


def time_generation(models: dict[str, nn.Module], vocab: int, new: int, rounds: int) -> dict:
    """Seconds in which each writes `new` tokens; all must write the same."""
    prompt, runs = torch.randint(1, vocab, (1, PROMPT)), {}
    llama = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    for name, model in models.items():
        greedy = llama if name == "Llama" else {"max_new_tokens": new, "temperature": 0}
        runs[name] = functools.partial(model.eval().generate, prompt, **greedy)
    first, second = (run() for run in runs.values())
    assert torch.equal(first, second) and first.shape == (1, PROMPT + new)
    return interleave(runs, rounds, budget=20.0)


def training_step(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """A call that takes one step of AdamW on `tokens` (B, L + 1)."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
    x, y = tokens[:, :-1], tokens[:, 1:]

    def step() -> None:
        if isinstance(model, mamba.Mamba | transformer.Transformer):
            loss = model(x, targets=y)
        else:
            loss = F.cross_entropy(logits_of(model, x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_training(models: dict[str, nn.Module], sizes: dict, rounds: int) -> dict[str, list]:
    """Seconds a step."""
    tokens = torch.randint(1, sizes["vocab"], (sizes["batch"], sizes["length"] + 1))
    steps = {name: training_step(model, tokens) for name, model in models.items()}
    return interleave(steps, rounds, budget=60.0)


# ----- The three measurements


def measure_families(families: dict, sizes: dict, rounds: int) -> list[dict]:
    """A row a model and job: tokens a second, and how many times faster ours is."""
    rows, new = [], sizes["generated"]
    tokens = {"generation": new, "training": sizes["batch"] * sizes["length"]}
    for script, models in families.items():
        times = {"generation": time_generation(models, sizes["vocab"], new, rounds)}
        times["training"] = time_training(models, sizes, rounds)  # later: it changes the weights
        for job, name in itertools.product(times, models):
            seconds, ours = times[job][name], median(times[job]["ours"])
            row = {"script": script, "job": job, "model": name}
            row |= {"tokens_a_second": tokens[job] / median(seconds)}
            rows.append(row | {"ratio": median(seconds) / ours, "seconds": seconds})
    print_rows(rows)
    return rows


def measure_pair(sizes: dict[str, int], rounds: int) -> dict:
    """Training tokens a second of both scripts' models at equal parameters."""
    models = dict(zip(("mamba.py", "transformer.py"), our_models(sizes, tied=True), strict=True))
    pair, times = {}, time_training(models, sizes, rounds)
    for name, model in models.items():
        rate = sizes["batch"] * sizes["length"] / median(times[name])
        pair[name] = {"parameters": count(model), "tokens_a_second": rate, "seconds": times[name]}
    return pair


def measure_folder(folder: str, new: int, rounds: int) -> dict:
    """Tokens a second of a real model in Llama's layout, and what share that is of the floor's."""
    from transformers import LlamaForCausalLM

    models = {"ours": transformer.read_folder(folder)}
    models["Llama"] = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    models["Llama"].generation_config.eos_token_id = None  # nothing stops early
    times = time_generation(models, models["ours"].config.vocab_size, new, rounds)
    memory = torch.ones(2**29)  # two gigabytes, which are read and added up
    bytes_a_second = memory.nbytes / best_of(10, memory.sum)
    rates = {name: new / median(seconds) for name, seconds in times.items()}
    size, ratio = 4 * count(models["ours"]), rates["ours"] / rates["Llama"]
    share = rates["ours"] * size / bytes_a_second
    print(f"generation: {rates}, {share:.0%} of the floor at {bytes_a_second / 1e9:.1f} GB/s")
    goals = [goal("generation of a real model over Llama's", ratio, FOLDER_GOAL)]
    result = {"tokens_a_second": rates, "ratio": ratio, "share_of_memory_floor": share}
    result |= {"weight_bytes": size, "bytes_a_second": bytes_a_second, "new_tokens": new}
    return result | {"seconds": times, "goals": goals}


def judge(rows: list[dict], pair: dict) -> list[dict]:
    goals = []
    for row in rows:
        if row["model"] in GOALS:
            text = f"{row['job']}: tokens a second over {row['model']}'s"
            goals.append(goal(text, row["ratio"], GOALS[row["model"]][row["job"]]))
    ratio = pair["mamba.py"]["tokens_a_second"] / pair["transformer.py"]["tokens_a_second"]
    text = "training: mamba.py's tokens a second over transformer.py's, equal parameters"
    return [*goals, goal(text, ratio, PAIR_GOAL)]


def main() -> None:
    folder = {"help": "only generation of the Llama in this folder"}
    args = _common.parse(__doc__, rounds=7, folder=folder)
    if args.folder:
        _common.write_result(args, "folder", **measure_folder(args.folder, 50, args.rounds))
        return
    sizes = SMOKE if args.smoke else FULL
    families = make_families(sizes)
    parameters = {script: count(models["ours"]) for script, models in families.items()}
    rows = measure_families(families, sizes, args.rounds)
    pair = measure_pair(sizes, 2 * args.rounds)
    measured = {"pair": pair, "sizes": sizes, "parameters": parameters, "measured": rows}
    _common.write_result(args, "model", **measured, goals=judge(rows, pair))


if __name__ == "__main__":
    main()
