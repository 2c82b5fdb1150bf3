"""recaption.py against transformers' CLIP loss and CLIP's own text layers, and plain loops."""

import math

import pytest
import torch
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

import recaption as r
from tests._helpers import close, far_from_zero

pytestmark = pytest.mark.usefixtures("one_thread")


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_clip_loss_and_score_are_transformers():
    sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = sizes | dict(vocab_size=30, max_position_embeddings=9, eos_token_id=29, bos_token_id=1)
    image = sizes | dict(image_size=16, patch_size=8)
    config = CLIPConfig(text_config=text, vision_config=image, projection_dim=6)
    model = CLIPModel(config).double().eval().requires_grad_(False)
    scale = model.logit_scale.exp()
    for B in 1, 2, 7:
        tokens = torch.cat([torch.randint(2, 29, (B, 5)), torch.full((B, 1), 29)], 1)
        theirs = model(input_ids=tokens, pixel_values=doubles(B, 3, 16, 16), return_loss=True)
        pair = theirs.image_embeds, theirs.text_embeds
        close(r.clip_loss(*pair, scale), theirs.loss)
        close(scale * r.clip_score(*pair) / 100, theirs.logits_per_image.diagonal())


def test_a_layer_without_memory_is_clips():
    """The same weights in their encoder layer, with their causal mask."""
    ours, config = far_from_zero(r.Layer(8)), CLIPConfig().text_config
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 8, 32, 4
    config.hidden_act, config._attn_implementation = "gelu_pytorch_tanh", "sdpa"
    theirs = CLIPEncoderLayer(config).double().eval().requires_grad_(False)
    attention = theirs.self_attn
    pairs = {theirs.layer_norm1: ours.norms[0], theirs.layer_norm2: ours.norms[1]}
    pairs |= {attention.q_proj: ours.attend.q, attention.out_proj: ours.attend.out}
    pairs |= {theirs.mlp.fc1: ours.mlp[0], theirs.mlp.fc2: ours.mlp[2]}
    for a, b in pairs.items():
        a.load_state_dict(b.state_dict())
    for i, module in enumerate((attention.k_proj, attention.v_proj)):
        module.weight.copy_(ours.attend.kv.weight[8 * i : 8 * i + 8])
        module.bias.copy_(ours.attend.kv.bias[8 * i : 8 * i + 8])
    x, mask = doubles(3, 5, 8), torch.full((3, 1, 5, 5), -math.inf, dtype=torch.float64).triu(1)
    found = theirs(x, attention_mask=mask)
    close(ours(x, causal=True), found[0] if isinstance(found, tuple) else found)


def attend(at, x, memory):
    """One query (D,) over the rows of a memory (S, D), head by head, key by key."""
    q, D, parts = at.q(x), len(x), []
    size = D // at.heads
    for head in range(at.heads):
        piece, keys = slice(head * size, (head + 1) * size), [at.kv(row) for row in memory]
        weights = torch.stack([q[piece] @ key[:D][piece] / size**0.5 for key in keys]).softmax(0)
        parts.append(sum(w * key[D:][piece] for w, key in zip(weights, keys, strict=True)))
    return at.out(torch.cat(parts))


def test_the_decoder_token_by_token():
    """Lower half: text alone. Upper half: text, then the memory. By plain loops."""
    model = far_from_zero(r.TextDecoder(r.Config(width=8), r.Tokenizer("abcdefgh")))
    tokens, memory = torch.randint(12, (2, 5)), doubles(2, 3, 8)
    logits = model.write(model.read(tokens), memory)
    for b in range(2):
        rows = list(model.enter(model.embed.weight[tokens[b]] + model.place[:5]))
        for layer in (*model.lower, *model.upper):
            seen = [layer.norms[0](row) for row in rows]
            for t in range(5):
                rows[t] = rows[t] + attend(layer.attend, seen[t], seen[: t + 1])
                if layer.cross:
                    rows[t] = rows[t] + attend(layer.cross, layer.norms[2](rows[t]), memory[b])
                rows[t] = rows[t] + layer.mlp(layer.norms[1](rows[t]))
        close(logits[b], model.norm(torch.stack(rows)) @ model.embed.weight.T)
