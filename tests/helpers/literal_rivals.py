"""The losses of the rivals written down as their sources run them, slowly; nothing is shared with replib.

Every row is a request padded on its left and an answer padded on its right; each list passes the model in forwards of
its own, with and without the adapter; logits and hidden states of all tokens are materialised, masks are multiplied,
labels are -100 where nothing is learned. Each loss is built as one graph.
"""

import torch

from helpers.literal import Rows

CE = torch.nn.functional.cross_entropy


def forward(chat, rows):
    return chat.model(
        input_ids=rows.ids,
        attention_mask=rows.mask,
        position_ids=rows.place,
        output_hidden_states=True,
        use_cache=False,
    )


def frozen(chat, rows):
    with torch.no_grad(), chat.adapter_off():
        return forward(chat, rows)


def rows_of(chat, dialogues, **lengths):
    return Rows(chat, [(d.prompt, d.response) for d in dialogues], True, **lengths)


def labels(rows):
    return rows.ids.masked_fill(rows.response == 0, -100)


def batch_loss(logits, target):
    """Summed cross-entropy of each row, as NPO's code computes it: transposed logits, -100 ignored."""
    shifted, target = logits[:, :-1].float(), target[:, 1:]
    return CE(shifted.transpose(1, 2), target, ignore_index=-100, reduction="none").sum(dim=1)


def mean_loss(logits, target):
    return CE(logits[:, :-1].float().flatten(0, 1), target[:, 1:].flatten(), ignore_index=-100)


def sft(chat, dialogues, **lengths):
    rows = rows_of(chat, dialogues, **lengths)
    return mean_loss(forward(chat, rows).logits, labels(rows))


def dpo(chat, pairs, beta, **lengths):
    ratio = []
    for answer in ("safe_response", "unsafe_response"):
        rows = Rows(chat, [(c.prompt, getattr(c, answer)) for c in pairs], True, **lengths)
        now, before = (forward(chat, rows).logits, frozen(chat, rows).logits)
        taken = [torch.gather(z[:, :-1].log_softmax(-1), 2, rows.ids[:, 1:, None])[:, :, 0] for z in (now, before)]
        ratio.append(((taken[0] - taken[1]) * rows.response[:, 1:]).sum(1))
    return -torch.log(1 / (1 + torch.exp(-beta * (ratio[0] - ratio[1])))).mean()


def keep(chat, dialogues, ce, kl, tau, **lengths):
    rows = rows_of(chat, dialogues, **lengths)
    now, before = forward(chat, rows).logits, frozen(chat, rows).logits
    read = rows.response[:, 1:]
    p, q = (before[:, :-1] / tau).softmax(-1), (now[:, :-1] / tau).softmax(-1)
    token = (p * (p.log() - q.log())).sum(-1) * read
    return ce * mean_loss(now, labels(rows)) + kl * tau**2 * token.sum() / read.sum()


def npo(chat, dialogues, beta, **lengths):
    """With losses, not log-probabilities: the ratio has the other sign, and so has the argument of the sigmoid."""
    rows = rows_of(chat, dialogues, **lengths)
    neg_log_ratio = batch_loss(forward(chat, rows).logits, labels(rows)) - batch_loss(
        frozen(chat, rows).logits, labels(rows)
    )
    return -torch.nn.functional.logsigmoid(beta * neg_log_ratio).mean() * 2 / beta


def rmu(chat, unsafe, retain, layer, alpha, steering, seed, **lengths):
    """``layer`` is a block; transformers' hidden state of its output has the next number."""
    u = torch.rand(chat.d_model, generator=torch.Generator().manual_seed(seed))
    control = u / u.norm() * steering
    bad, good = rows_of(chat, unsafe, **lengths), rows_of(chat, retain, **lengths)
    now, kept = (_after_block(chat, forward, rows, layer) for rows in (bad, good))
    before = _after_block(chat, frozen, good, layer)
    forget = ((now - control) ** 2 * bad.mask[..., None]).sum() / (bad.mask.sum() * chat.d_model)
    stay = ((kept - before) ** 2 * good.mask[..., None]).sum() / (good.mask.sum() * chat.d_model)
    return forget + alpha * stay


def _after_block(chat, run, rows, layer):
    """The source's own hook."""
    cache = []
    handle = chat.blocks[layer].register_forward_hook(
        lambda _m, _a, out: cache.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    hidden = run(chat, rows).hidden_states
    handle.remove()
    if layer + 1 < len(chat.blocks):  # the last hidden state stands behind the final norm
        assert torch.equal(cache[0], hidden[layer + 1])
    return cache[0]


def circuit_breaker(chat, unsafe, retain, hidden_layers, kept, alpha, progress, relative=False, **lengths):
    """``hidden_layers`` number hidden states; the model is cut behind its first ``kept`` blocks, as in the source."""
    bad, good = rows_of(chat, unsafe, **lengths), rows_of(chat, retain, **lengths)
    with _cut(chat, kept):
        states = lambda run, rows: torch.stack(run(chat, rows).hidden_states)  # noqa: E731
        good_now, good_before = states(forward, good), states(frozen, good)
        bad_now, bad_before = states(forward, bad), states(frozen, bad)
    mask = good.mask[None, :, :, None]
    lengths_ = (good_now * mask - good_before * mask).norm(dim=-1, p=2, dtype=torch.float)
    if relative:  # not in the source
        lengths_ = lengths_ / good_before.norm(dim=-1, dtype=torch.float).clamp(min=1e-12)
    stay = lengths_.sum() / (len(good_now) * good.mask.sum())  # the source divides by padding too
    pick = list(hidden_layers)
    unit = lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)  # noqa: E731 - a pad's state may be zero
    now, before = unit(bad_now[pick]), unit(bad_before[pick])
    inner = now * before * bad.mask[None, :, :, None]
    reroute = torch.relu(inner.sum(-1)).sum() / (bad.mask.sum() * len(pick))
    share = progress / 2  # step / 300 where the run has 150
    return alpha * share * stay + alpha * (1 - share) * reroute


class _cut:
    """The decoder without its upper blocks; the final norm then follows the last that is left."""

    def __init__(self, chat, kept):
        self.chat, self.kept = chat, kept

    def __enter__(self):
        base = self.chat.causal_lm
        self.holder, self.name = (base.transformer, "h") if hasattr(base, "transformer") else (base.model, "layers")
        self.all, config = getattr(self.holder, self.name), base.config
        setattr(self.holder, self.name, self.all[: self.kept])
        self.depth, config.num_hidden_layers = config.num_hidden_layers, self.kept

    def __exit__(self, *_):
        setattr(self.holder, self.name, self.all)
        self.chat.causal_lm.config.num_hidden_layers = self.depth


def generic(chat, dialogues, alpha, **lengths):
    """WHP's pseudo-labels [rows, tokens], at the place of the token that they replace; -100 elsewhere."""
    rows = rows_of(chat, dialogues, **lengths)
    with torch.no_grad():
        reinforced, base = forward(chat, rows).logits, frozen(chat, rows).logits
    z = torch.where(reinforced > base, base - alpha * (reinforced - base), base)
    told = torch.full_like(rows.ids, -100)
    told[:, 1:] = z[:, :-1].argmax(-1)
    return told.masked_fill(rows.response == 0, -100), rows
