"""What rotary positions buy: `python tests/claims/transformer_claims.py parts`.

Transformer++ (appendix E.2.1 of arXiv 2312.00752) has rotary positions for learned ones, exchanged
here in either direction at equal parameters, tokens and data order. Every arm trains at each of the
rates on seed 0, which is not reported, and keeps the best. `default` is transformer.py's default.
"""

from dataclasses import replace

import _claims
from _claims import Claim, Setting, mean_sd, new_model, plus_minus
from _default import default_run

import transformer

PARTS = {
    "data": Setting("", "as transformer.py's: text to train on and to measure on"),
    "tokenizer": Setting("bpe:1024", "as transformer.py's", smoke="byte"),
    "d_model": Setting(96, "width; the paper's 768 to 2,048", 16),
    "n_layer": Setting(2, "layers; the paper's 12 to 24", 1),
    "n_head": Setting(4, "heads; the paper's 12 to 32"),
    "steps": Setting(300, "steps; the paper's 4,800 and more", 2),
    "batch": Setting(8, "sequences a step; the paper's 256, half a million tokens", 2),
    "length": Setting(256, "tokens a sequence; the paper's 2,048", 16),
    "rates": Setting("1e-3 2e-3 4e-3", "peak learning rates, tried on seed 0", "1e-3"),
    "eval_tokens": Setting(0, "validation tokens, 0 for all", 300),
}
VANILLA = {"position": "learned", "mlp": "gelu", "norm": "layernorm"}
PLUS = {"position": "rope", "mlp": "swiglu", "norm": "rmsnorm"}
ARMS = {
    "Transformer": VANILLA,
    "Transformer + rotary positions": VANILLA | {"position": "rope"},
    "Transformer++ without rotary positions": PLUS | {"position": "learned"},
    "Transformer++": PLUS,
}


def count(shape: transformer.TransformerConfig) -> int:
    return sum(p.numel() for p in transformer.Transformer(shape).parameters())


def equal_parameters(shape: transformer.TransformerConfig) -> transformer.TransformerConfig:
    """With the MLP's width that brings it nearest to a Transformer++ of the usual width."""
    goal = count(replace(shape, **PLUS))
    one, two = (count(replace(shape, d_ff=width)) for width in (1, 2))
    return replace(shape, d_ff=1 + round((goal - one) / (two - one)))


def train(s, shape: transformer.TransformerConfig, corpus, lr: float, seed: int) -> float:
    """Validation bits a byte of one run by the script's recipe."""
    sizes = {"steps": s.steps, "batch": s.batch, "length": s.length}
    config = transformer.Config(**sizes, lr=lr, seed=seed)
    model = new_model(lambda: transformer.Transformer(shape), seed)
    optimizer = transformer.make_optimizer(model, config)
    for step in range(s.steps):
        transformer.train_step(model, optimizer, corpus, config, step)
    return transformer.evaluate(model, corpus, config, s.eval_tokens)["bits_a_byte"]


def measure_parts(s, seeds: list[int], progress) -> dict:
    """Every arm: its rate chosen on seed 0, then the seeds."""
    arms, corpus = [], transformer.load_corpus(s.data, s.tokenizer)
    sizes = {"vocab_size": corpus.vocab_size, "max_length": s.length}
    for name, parts in ARMS.items():
        shape = transformer.TransformerConfig(s.d_model, s.n_layer, s.n_head, **sizes, **parts)
        shape = equal_parameters(shape)
        tried = {lr: train(s, shape, corpus, lr, 0) for lr in map(float, s.rates.split())}
        best = min(tried, key=tried.get)
        score = mean_sd([train(s, shape, corpus, best, seed) for seed in seeds])
        arm = {"arm": name, "parts": parts, "d_ff": shape.d_ff}
        arm |= {"parameters": count(shape), "lr": best}
        arm |= {"tried_on_seed_0": tried, "bits_a_byte": score.pop("each")}
        arms.append(arm | score)
        progress(f"{name}: {plus_minus(arms[-1], 3)} at {best:g}")
    return {"tokens_seen": s.steps * s.batch * s.length, "arms": arms}


def parts_table(result: dict) -> str:
    """Bits a byte by arm."""
    arms = [arm for arm in result["arms"] if arm["arm"] in ARMS]
    rows = []
    for arm in arms:
        cells = [arm["arm"], f"{arm['parameters']:,}", f"{arm['lr']:g}", plus_minus(arm, 3)]
        rows.append([*cells, f"{arm['mean'] - arms[0]['mean']:+.3f}"])
    head = ["model", "parameters", "peak rate", "validation bits a byte", "against the first"]
    return _claims.markdown(head, rows)


def draw_parts(result: dict, plt):
    """A bar for each arm, a dot for each seed."""
    figure, axes = plt.subplots(figsize=(7.5, 2.4), layout="constrained")
    arms = [arm for arm in result["arms"] if arm["arm"] in ARMS]
    for arm in arms:
        axes.barh(arm["arm"], arm["mean"], color="C0", alpha=0.6)
        axes.plot(arm["bits_a_byte"], [arm["arm"]] * len(arm["bits_a_byte"]), "k.", ms=4)
    axes.set(xlabel="validation bits a byte", xlim=(min(arm["mean"] for arm in arms) - 0.2, None))
    axes.invert_yaxis()
    return figure


CLAIMS = {
    "parts": Claim("transformer_plus_plus", PARTS, measure_parts, parts_table, draw_parts),
    "default": default_run(transformer),
}

if __name__ == "__main__":
    _claims.main(transformer, __doc__, CLAIMS)
