"""What the Mamba paper claims (arXiv 2312.00752): `python tests/claims/mamba_claims.py WORD`.

induction  To recall what followed a special symbol (section 4.1.2, table 11): a two-layer Mamba
           trained at length 256 does it at every length up to 1,048,576, where attention falls to
           31.3 % at 512. A third model, trained on with carried states, is not the paper's.
copying    To copy tokens that stand at random places in noise a model has to choose, by content,
           what enters its state (section 4.1.1, table 1). Every arm is the same block, in which
           delta, B and C depend on the input or do not.
ablation   In language modelling delta is the most important selective parameter, and a larger state
           helps only where B and C are selective (section 4.6.2, tables 7 and 10). The paper's
           models have about 350M parameters; that --paper has just their sizes was not checked.
default    mamba.py's default run.

In the first two tasks training begins with shorter sequences, which teach sooner. What was tuned
was tuned on seed 0, which is not reported.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import _claims
import torch
import torch.nn.functional as F
from _claims import Claim, Setting, device, mean_sd, new_model, plus_minus
from _default import default_run
from torch import Tensor, nn

import mamba
import transformer

# ----- Training, on a task and on text ------------------------------------------------------------


def generator(*numbers: int) -> torch.Generator:
    """A random state of its own for these numbers (seed, purpose, ...), in every process."""
    return torch.Generator().manual_seed(hash(numbers) % 2**63)


def cosine(share: float, last: float) -> float:
    """From 1 down to `last` as share goes from 0 to 1."""
    return last + (1 - last) * math.cos(math.pi / 2 * share) ** 2


def update(model: nn.Module, optimizer, rate: float, loss: Tensor, clip: float = 1.0) -> None:
    """A step of the optimiser at that rate, with the gradient's norm clipped."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError("training diverged; lower --lr")
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def count_right(model: nn.Module, inputs: Tensor, targets: Tensor, chunk=None) -> int:
    """How many targets (B, M) the model gives at the last M of the inputs (B, L).

    With a chunk it reads so many inputs at a time and carries its state.
    """
    if chunk is None:
        logits = model(inputs.to(device()))
    else:
        state = None
        for piece in inputs.split(chunk, dim=1):
            logits, state = model(piece.to(device()), state, return_state=True)
    return (logits[:, -targets.shape[1] :].argmax(-1).cpu() == targets).sum().item()


def train(model, s, steps: int, draw: Callable, check: Callable, last=1.0) -> list:
    """Adam without weight decay, its rate falling to `last` of it: (step, check()) by s.every.

    draw(length) gives inputs (B, L) and targets (B, M): the model answers at the last M positions.
    The length is at least s.first_length, doubled until it is s.length, in equally many steps each.
    """
    optimizer, lengths, seen = torch.optim.Adam(model.parameters(), fused=True), [s.length], []
    while lengths[0] // 2 >= s.first_length:
        lengths.insert(0, lengths[0] // 2)
    for step in range(steps):
        inputs, targets = (x.to(device()) for x in draw(lengths[step * len(lengths) // steps]))
        logits = model(inputs)[:, -targets.shape[1] :]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        rate = s.lr * min(1.0, (step + 1) / 100) * cosine(step / steps, last)
        update(model, optimizer, rate, loss)
        if (step + 1) % s.every == 0 or step + 1 == steps:
            seen.append((step + 1, check()))
    return seen


def model_of(s, corpus: mamba.Corpus, seed: int, selective="delta,B,C", **sizes) -> tuple:
    """A new model of the sizes that the settings s have, and mamba.py's config to train it."""
    names = ("d_model", "n_layer", "steps", "batch", "length", "lr")
    config = mamba.Config(**{name: getattr(s, name) for name in names}, **sizes, seed=seed)
    shape = mamba.MambaConfig(s.d_model, s.n_layer, corpus.vocab_size, config.d_state)
    return new_model(lambda: make_mamba(shape, selective), seed), config


# ----- Blocks of which less is selective ----------------------------------------------------------


class AblatedBlock(mamba.MambaBlock):
    """A block in which only the `selective` of delta, B and C depend on the input.

    A B or C that does not is a value a channel and state, as in S4D, where the scan has one a
    position and state. So here each state is a channel of the scan, with one state of its own.
    """

    def __init__(self, config: mamba.MambaConfig, selective: tuple[str, ...]):
        super().__init__(config)
        E, N = self.A_log.shape
        sizes = {"delta": config.rank, "B": N, "C": N}
        self.sizes = {name: sizes[name] for name in selective}
        width = sum(self.sizes.values())
        self.x_proj = nn.Linear(E, width, bias=False) if selective else None
        if "delta" not in selective:
            self.dt_proj.weight = None  # the bias alone is then the step size
        if "B" not in selective:
            self.B = nn.Parameter(torch.ones(E * N))  # flat: the optimiser lets matrices decay
        if "C" not in selective:
            self.C = nn.Parameter(torch.randn(E * N))

    def forward(self, x: Tensor, state=None, starts: Tensor | None = None) -> tuple[Tensor, None]:
        """As a MambaBlock's, but always from nothing, and without the state after it."""
        E, N = self.A_log.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, _ = mamba.causal_conv(x, self.conv1d.weight, self.conv1d.bias, starts=starts)
        x = F.silu(x)
        parts = self.x_proj(x).split(list(self.sizes.values()), dim=-1) if self.sizes else ()
        found = dict(zip(self.sizes, parts, strict=True))
        delta, one = self.dt_proj.bias.expand_as(x), x.new_ones(*x.shape[:2], 1)
        if "delta" in found:
            delta = delta + F.linear(found["delta"], self.dt_proj.weight)
        B = found["B"].repeat(1, 1, E) if "B" in found else self.B  # (B, L, E N) or (E N,)
        C = found["C"].repeat(1, 1, E) if "C" in found else self.C
        u, delta = (tensor.repeat_interleave(N, dim=-1) for tensor in (x, delta))  # (B, L, E N)
        A = -torch.exp(self.A_log).view(-1, 1)
        h = mamba.selective_scan(u * B, delta, A, one, one, delta_softplus=True, starts=starts)
        y = (h * C).unflatten(-1, (E, N)).sum(-1) + self.D * x
        return self.out_proj(y * F.silu(z)), None


def make_mamba(config: mamba.MambaConfig, selective: str = "delta,B,C") -> mamba.Mamba:
    """A new model in which only these of delta, B and C depend on the input."""
    model = mamba.Mamba(config)
    if selective != "delta,B,C":
        for layer in model.backbone.layers:
            layer.mixer = AblatedBlock(config, tuple(filter(None, selective.split(","))))
    return model


# ----- Induction heads ----------------------------------------------------------------------------

HEADS = {
    "length": Setting(256, "length trained at", smoke=16, paper=256),
    "first_length": Setting(16, "but at first at this one, then at doubles", 8, 256),
    "shortest": Setting(64, "evaluated at this length, and at each doubled", 8, 64),
    "longest": Setting(2**20, "and up to this one", 64, 2**20),
    "attention_longest": Setting(2**14, "and the Transformer up to this one", 32, 2**14),
    "chunk": Setting(2048, "symbols that Mamba reads at a time when it is evaluated", 24),
    "sequences": Setting(64, "sequences evaluated at a length", 8, 512),
    "budget": Setting(2**22, "most symbols evaluated at a length", 128, 2**24),
    "few": Setting(16, "but at least so many sequences", 2, 64),
    "vocab": Setting(16, "symbols, with the special one", paper=16),
    "d_model": Setting(64, "width", 16, 64),
    "n_layer": Setting(2, "layers", paper=2),
    "n_head": Setting(4, "heads of the Transformer"),
    "steps": Setting(1500, "steps of Mamba", 4, 25 * 8192),
    "carried_steps": Setting(8000, "steps more of Mamba with carried states", 6),
    "streams": Setting(12, "sequences of these steps, of up to 2, 4, 8, ... windows", 2),
    "attention_steps": Setting(2000, "steps of the Transformer", 4, 25 * 8192),
    "batch": Setting(8, "sequences a step, more while they are shorter", 4, 8),
    "lr": Setting(2e-3, "constant learning rate", paper=1e-3),
    "every": Setting(100, "steps between evaluations at the length trained at", 2, 8192),
}
MODELS = ("Mamba", "Mamba, carried states", "Transformer++")


def induction(batch: int, length: int, vocab: int, random) -> tuple[Tensor, Tensor]:
    """Inputs (B, length) and targets (B, 1): what followed the first of the two special symbols.

    That is the last of vocab, among random others. The second stands at the end, the first at any
    place before, each equally likely, that leaves room for an answer.
    """
    inputs = torch.randint(vocab - 1, (batch, length), generator=random)
    place = torch.randint(length - 2, (batch, 1), generator=random)
    inputs.scatter_(1, place, vocab - 1)[:, -1] = vocab - 1
    return inputs, inputs.gather(1, place + 1)


def train_on_carried_states(model: mamba.Mamba, s: SimpleNamespace, seed: int) -> None:
    """Truncated back-propagation: windows of `length` symbols, in sequences of many windows.

    `batch` of the sequences have one window. The others, the streams, have up to 2, 4, 8, ...:
    the first holds the special symbol and its answer, the others are noise, and each begins with
    the state that the one before left, a step ago and without gradient. Each ends with the special
    symbol, is trained on the answer, and goes on from the state before that symbol. The longest
    sequences grow as training goes on; the rate falls to a hundredth. So no gradient spans more
    than `length` symbols, but states come from up to 2^streams times as many.
    """
    random, rows = generator(seed, 3), s.batch + s.streams
    windows = torch.tensor([1] * s.batch + [2 ** (j + 1) for j in range(s.streams)])
    age = answer = torch.zeros(rows, dtype=torch.long)
    optimizer, state = torch.optim.Adam(model.parameters(), fused=True), None
    for step in range(s.carried_steps):
        share, begins = step / s.carried_steps, age == 0
        inputs, targets = induction(rows, s.length, s.vocab, random)
        noise = torch.randint(s.vocab - 1, inputs.shape, generator=random)
        noise[:, -1] = s.vocab - 1
        inputs = torch.where(begins[:, None], inputs, noise).to(device())
        answer = torch.where(begins, targets[:, 0], answer)
        if state is not None:
            new = begins.to(device())[:, None, None]
            state = [tuple(x.detach().masked_fill(new, 0.0) for x in layer) for layer in state]
        _, state = model.hidden(inputs[:, :-1], state)
        logits, _ = model.step(inputs[:, -1], state)
        loss = F.cross_entropy(logits, answer.to(device()))
        update(model, optimizer, s.lr * cosine(share, 0.01), loss)
        longest = 2 ** (1 + int(s.streams * min(1.0, 2 * share)))  # doubled until half-way
        age = age + 1
        age[age >= windows.clamp(max=longest)] = 0


def heads_accuracy(model: nn.Module, s, length: int, random) -> float:
    """Per cent of right answers to new sequences of that length."""
    right, rows, chunk = 0, 16, s.chunk
    if not isinstance(model, mamba.Mamba):
        rows, chunk = max(1, min(16, 2**14 // length)), None
    for first in range(0, count_at(length, s), rows):
        count = min(rows, count_at(length, s) - first)
        right += count_right(model, *induction(count, length, s.vocab, random), chunk)
    return 100 * right / count_at(length, s)


def count_at(length: int, s: SimpleNamespace) -> int:
    """Sequences that are evaluated at a length."""
    return max(s.few, min(s.sequences, s.budget // length))


def run_heads(kind: str, s: SimpleNamespace, seed: int) -> dict:
    """One model: its accuracy at the trained length by step, and after training at every length."""
    random, steps, longest = generator(seed, 0), s.steps, s.longest
    shape, make = mamba.MambaConfig(s.d_model, s.n_layer, s.vocab), mamba.Mamba
    if kind == "Transformer++":
        steps, longest, make = s.attention_steps, s.attention_longest, transformer.Transformer
        shape = transformer.TransformerConfig(s.d_model, s.n_layer, s.n_head, vocab_size=s.vocab)
    model = new_model(lambda: make(shape), seed)

    def draw(length: int) -> tuple[Tensor, Tensor]:
        return induction(s.batch * s.length // length, length, s.vocab, random)

    def check() -> float:
        return heads_accuracy(model, s, s.length, generator(seed, 1))

    curve = train(model, s, steps, draw, check)
    if kind == "Mamba, carried states":
        train_on_carried_states(model, s, seed)
    scores, length = {}, s.shortest
    while length <= longest:
        scores[length] = heads_accuracy(model, s, length, generator(seed, 2, length))
        length *= 2
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "curve": curve, "accuracy": scores}


def measure_heads(s: SimpleNamespace, seeds: list[int], progress: Callable) -> dict:
    """Every model over the seeds."""
    models = {}
    for kind in MODELS:
        runs = []
        for seed in seeds:
            runs.append(run_heads(kind, s, seed))
            ends = runs[-1]["accuracy"].items()
            shown = " · ".join(f"{length:,}: {right:.0f} %" for length, right in ends)
            progress(f"{kind}, seed {seed}: {shown}")
        scores = {n: mean_sd([run["accuracy"][n] for run in runs]) for n in runs[0]["accuracy"]}
        models[kind] = {"parameters": runs[0]["parameters"], "accuracy": scores}
        models[kind]["curves"] = [run["curve"] for run in runs]
    guessing = 100 / (s.vocab - 1)
    return {"unit": "per cent of right answers", "guessing": guessing, "models": models}


def heads_table(result: dict) -> str:
    """Accuracy by length."""
    models, rows, s = result["models"], [], SimpleNamespace(**result["settings"])
    for length in map(int, models["Mamba"]["accuracy"]):
        row = [f"{length:,}", str(len(result["seeds"]) * count_at(length, s))]
        for model in models.values():
            score = model["accuracy"].get(str(length))
            row.append(plus_minus(score, 1) if score else "–")
        rows.append(row)
    return _claims.markdown(["length", "sequences", *(f"{kind}, %" for kind in models)], rows, 0)


def draw_heads(result: dict, plt):
    """Accuracy by length."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, model in result["models"].items():
        lengths = [int(length) for length in model["accuracy"]]
        runs = zip(*(score["each"] for score in model["accuracy"].values()), strict=True)
        _claims.draw_band(axes, lengths, runs, "o-", ms=3, label=kind)
    axes.axvline(result["settings"]["length"], color="grey", lw=1, ls="--", label="trained at")
    axes.axhline(result["guessing"], color="grey", lw=1, ls=":", label="guessing")
    axes.set(xlabel="length", ylabel="right answers, %")
    axes.set_xscale("log", base=2)
    axes.legend()
    return figure


# ----- Selective copying --------------------------------------------------------------------------

COPYING = {
    "length": Setting(256, "positions of the noise and the data tokens", smoke=12, paper=4096),
    "first_length": Setting(16, "but at first these, then twice as many", 6, 4096),
    "tokens": Setting(8, "data tokens to copy", 3, 16),
    "vocab": Setting(16, "symbols, with noise and marker", paper=16),
    "d_model": Setting(64, "width", 16, 64),
    "n_layer": Setting(2, "layers", paper=2),
    "d_state": Setting(4, "states a channel; the paper does not say", paper=16),
    "steps": Setting(4000, "steps", 4, 400_000),
    "batch": Setting(8, "sequences a step, more while they are shorter", 4, 64),
    "lr": Setting(2e-3, "learning rate", paper=1e-4),
    "last_lr": Setting(0.01, "part of the rate that is left at the end, by a cosine", paper=1.0),
    "every": Setting(250, "steps between evaluations", 2, 10_000),
    "sequences": Setting(256, "sequences of an evaluation", 8),
}
ARMS = {  # name: what is selective, and the paper's nearest figure
    "delta, B and C (Mamba)": ("delta,B,C", "99.8"),
    "nothing: time-invariant": ("", "18.3 (S4), 30.1 (Hyena)"),
}


def copying(batch: int, length: int, tokens: int, vocab: int, random) -> tuple[Tensor, Tensor]:
    """Inputs (B, length + tokens) and targets (B, tokens), which stand in order in the noise.

    Then come as many markers, at which they are to be given. Symbol 0 is noise, the last one the
    marker. Places in a sequence differ, and every set of places is equally likely.
    """
    targets = torch.randint(1, vocab - 1, (batch, tokens), generator=random)
    places = torch.rand(batch, length, generator=random).argsort(1)[:, :tokens].sort(1).values
    inputs = torch.zeros(batch, length, dtype=torch.long).scatter(1, places, targets)
    return torch.cat([inputs, torch.full((batch, tokens), vocab - 1)], dim=1), targets


def run_copying(s: SimpleNamespace, selective: str, seed: int) -> list[tuple[int, float]]:
    """One training run: (step, per cent of tokens right) on sequences made for this alone."""
    random, config = generator(seed, 0), mamba.MambaConfig(s.d_model, s.n_layer, s.vocab, s.d_state)
    model = new_model(lambda: make_mamba(config, selective), seed)
    held_out = copying(s.sequences, s.length, s.tokens, s.vocab, generator(seed, 1))

    def draw(length: int) -> tuple[Tensor, Tensor]:
        batch = s.batch * (s.length + s.tokens) // (length + s.tokens)
        return copying(batch, length, s.tokens, s.vocab, random)

    def check() -> float:
        pieces = zip(*(tensor.split(32) for tensor in held_out), strict=True)
        right = sum(count_right(model, inputs, targets) for inputs, targets in pieces)
        return 100 * right / held_out[1].numel()

    return train(model, s, s.steps, draw, check, s.last_lr)


def measure_copying(s: SimpleNamespace, seeds: list[int], progress: Callable) -> dict:
    """Every arm over the seeds."""
    arms = []
    for name, (selective, paper) in ARMS.items():
        curves = []
        for seed in seeds:
            curves.append(run_copying(s, selective, seed))
            progress(f"{name}, seed {seed}: {curves[-1][-1][1]:.1f} %")
        final = mean_sd([curve[-1][1] for curve in curves])
        arm = {"arm": name, "selective": selective, "paper": paper, "final": final}
        arms.append(arm | {"curves": curves})
    unit = "per cent of the tokens right"
    return {"unit": unit, "guessing": 100 / (s.vocab - 2), "arms": arms}


def copying_table(result: dict) -> str:
    """Accuracy at the end."""
    rows = []
    for arm in result["arms"]:
        rows.append([arm["arm"], plus_minus(arm["final"], 1), arm["paper"] or "–"])
    return _claims.markdown(["what depends on the input", "tokens right, %", "paper, %"], rows)


def draw_copying(result: dict, plt):
    """Accuracy by step."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for arm in result["arms"]:
        steps = [step for step, _ in arm["curves"][0]]
        runs = [[score for _, score in curve] for curve in arm["curves"]]
        _claims.draw_band(axes, steps, runs, label=arm["arm"])
    axes.axhline(result["guessing"], color="grey", lw=1, ls=":", label="guessing")
    axes.set(xlabel="step", ylabel="tokens right, %", ylim=(0, 102))
    axes.legend(fontsize=8, title="selective")
    return figure


# ----- Which selection matters, and how large a state ---------------------------------------------

ABLATION = {
    "data": Setting("", "as mamba.py's: text, or the documentation that ships with Python"),
    "tokenizer": Setting("bpe:1024", "as mamba.py's", smoke="byte", paper="gpt2"),
    "d_model": Setting(64, "width", 16, 1024),
    "n_layer": Setting(2, "layers", paper=48),
    "steps": Setting(400, "steps", 2, 13_500),
    "batch": Setting(4, "sequences a step", 2, 256),
    "length": Setting(256, "tokens a sequence", 16, 2048),
    "lr": Setting(4e-3, "peak learning rate; the paper's is five times GPT-3's", paper=1.5e-3),
    "eval_tokens": Setting(0, "validation tokens, 0 for all", 300),
}
PERPLEXITIES = {  # the paper's, by what is selective and d_state, from memory of tables 7 and 10
    ("", 16): 10.93, ("B", 16): 10.15, ("C", 16): 9.98, ("B,C", 16): None, ("delta", 16): 9.81,
    ("delta,B", 16): None, ("delta,C", 16): None, ("delta,B,C", 16): 8.71,
    ("delta", 1): 9.88, ("delta", 2): 9.86, ("delta,B,C", 1): 9.73, ("delta,B,C", 2): 9.40,
}  # fmt: skip


def measure_ablation(s: SimpleNamespace, seeds: list[int], progress: Callable) -> dict:
    """Every arm; those of a seed see the same data in the same order."""
    arms, corpus = [], mamba.load_corpus(s.data, s.tokenizer)
    for selective, d_state in PERPLEXITIES:
        scores = []
        for seed in seeds:
            model, config = model_of(s, corpus, seed, selective, d_state=d_state)
            optimizer = mamba.make_optimizer(model, config)
            for step in range(config.steps):
                mamba.train_step(model, optimizer, corpus, config, step)
            scores.append(mamba.evaluate(model, corpus, config, s.eval_tokens))
        parameters = sum(p.numel() for p in model.parameters())
        arm = {"selective": selective, "d_state": d_state, "parameters": parameters}
        arm["bits_a_byte"] = mean_sd([score["bits_a_byte"] for score in scores])
        arm["perplexity_a_token"] = mean_sd([math.exp(score["loss"]) for score in scores])
        arms.append(arm)
        progress(f"{selective}, d_state {d_state}: {plus_minus(arm['bits_a_byte'], 3)}")
    return {"tokens_seen": s.steps * s.batch * s.length, "arms": arms}


def ablation_table(result: dict) -> str:
    """Bits a byte by what is selective and the size of the state."""
    rows = []
    for arm in result["arms"]:
        key = arm["selective"], arm["d_state"]
        if key in PERPLEXITIES:
            parts, paper = arm["selective"].split(","), PERPLEXITIES[key]
            ticks = ["yes" if name in parts else "–" for name in ("delta", "B", "C")]
            ours = f"{arm['parameters']:,}", plus_minus(arm["bits_a_byte"], 3)
            rows.append([*ticks, str(arm["d_state"]), *ours, f"{paper:.2f}" if paper else "–"])
    head = ["delta selective", "B", "C", "d_state", "parameters", "ours, bits a byte"]
    return _claims.markdown([*head, "paper, perplexity"], rows, left=3)


CLAIMS = {
    "default": default_run(mamba),
    "induction": Claim("induction_heads", HEADS, measure_heads, heads_table, draw_heads),
    "copying": Claim("selective_copying", COPYING, measure_copying, copying_table, draw_copying),
    "ablation": Claim("selection_ablation", ABLATION, measure_ablation, ablation_table),
}

if __name__ == "__main__":
    _claims.main(mamba, __doc__, CLAIMS)
