"""RepBend's loss written down as the formulas read, slowly: nothing is shared with replib but names of choices.

Every row is a request padded on its left and an answer padded on its right to fixed lengths; safe, unsafe and retained
rows pass the model in forwards of their own, with and without the adapter; all hidden states are materialised and
masks are multiplied. Coefficients have the names of the authors' code: alpha, beta, gamma and epsilon are the paper's
1/2, alpha, beta and gamma. ``output_hidden_states`` gives N + 1 tensors: the embeddings, the outputs of blocks 0 to
N - 2, and the last block's output behind the final norm.
"""

from __future__ import annotations

import torch

REQUEST, RESPONSE = 14, 8
FLOOR = 20  # longest stretch that response_R and the pairing term read
# Where the paper's other three activations are written, by architecture: the module, and whether it is its output.
TAPS = {
    "llama": {"attn_in": ("input_layernorm", 1), "resid_mid": ("post_attention_layernorm", 0),
              "mlp_in": ("post_attention_layernorm", 1)},
    "gemma2": {"attn_in": ("input_layernorm", 1), "resid_mid": ("pre_feedforward_layernorm", 0),
               "mlp_in": ("pre_feedforward_layernorm", 1)},
    "gpt2": {"attn_in": ("ln_1", 1), "resid_mid": ("ln_2", 0), "mlp_in": ("ln_2", 1)},
}  # fmt: skip
TAPS["qwen3"] = TAPS["llama"]


class Rows:
    """Some dialogues as padded tensors; all masks are [rows, REQUEST + RESPONSE]."""

    def __init__(self, chat, pairs, ended, request=REQUEST, response=RESPONSE):
        tok = chat.tokenizer
        asked = [tok(f"<s> {prompt} <end> <ask>")["input_ids"] for prompt, _ in pairs]
        given = [tok(answer + (" </s>" if ended else ""))["input_ids"] for _, answer in pairs]
        ids = [[0] * (request - len(a)) + a + g + [0] * (response - len(g)) for a, g in zip(asked, given, strict=True)]
        span = lambda k: [0] * (request - len(asked[k])) + [1] * len(asked[k])  # noqa: E731
        self.ids = torch.tensor(ids)
        self.request = torch.tensor([span(k) + [0] * response for k in range(len(pairs))])
        self.response = torch.tensor([[0] * request + [1] * len(g) + [0] * (response - len(g)) for g in given])
        self.mask = self.request + self.response
        self.place = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.border = request
        self.lengths = [len(g) for g in given]

    def last(self):
        mask = torch.zeros_like(self.mask)
        mask[:, self.border - 1] = 1
        return mask

    def first(self, count, start=0):
        """So many tokens from the first of the answer (or ``start`` places from it) on."""
        mask = torch.zeros_like(self.mask)
        mask[:, self.border + start : self.border + start + count] = 1
        return mask


def forward(chat, rows, kind, site, official):
    """States [layers, rows, tokens, dim] as the fidelity numbers them, and logits [rows, tokens, vocab]."""
    seen = [None] * len(chat.blocks)
    handles = []
    for i, block in enumerate(chat.blocks):

        def hook(_module, args, output=None, *, i=i):
            seen[i] = args[0] if output is None else output if isinstance(output, torch.Tensor) else output[0]

        name, after = ("", 1) if site == "resid_post" else TAPS[kind][site]
        module = block.get_submodule(name)
        handles.append(module.register_forward_hook(hook) if after else module.register_forward_pre_hook(hook))
    out = chat.model(input_ids=rows.ids, attention_mask=rows.mask, position_ids=rows.place, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    states = out.hidden_states if official and site == "resid_post" else seen
    return torch.stack(list(states)), out.logits


def pairs_of(contrasts, retain, complied, benign):
    """(prompt, answer) of the three forwards, and what each safe row is."""
    refusals = [(c.prompt, c.safe_response) for c in contrasts]
    turned = [(c.prompt, c.safe_response) for c in complied]
    kept = [(d.prompt, d.response) for d in benign]
    unsafe = [(c.prompt, c.unsafe_response) for c in complied or contrasts]
    kinds = ["refusal"] * len(refusals) + ["turned"] * len(turned) + ["benign"] * len(kept)
    return refusals + turned + kept, unsafe, [(d.prompt, d.response) for d in retain], kinds


def token_mask(rows, mode, shortest):
    return {
        "request_last": rows.last(),
        "request_all": rows.request,
        "request_response": rows.mask,
        "response_all": rows.response,
        "response_one": rows.first(1) * rows.response,
        "response_R": rows.first(min(FLOOR, shortest)) * rows.response,
    }[mode]


def mean_norm(difference, mask, layers):
    """Sum of unsquared norms over layers, rows and valid tokens, divided by layers times valid tokens."""
    lengths = (difference * mask[None, :, :, None]).norm(dim=-1, dtype=torch.float)
    return lengths.sum() / (layers * mask.sum())


def literal_loss(chat, kind, data, config, fidelity, layers, queue=None, **lengths):
    """alpha safe - beta unsafe + gamma (1 - cos) + epsilon kl + eta pairing, and the five terms by name.

    ``data``: contrasts, retain, complied, benign. ``layers``: target blocks. ``queue``: [layers, rows, dim].
    """
    contrasts, retain, complied, benign = data
    official = fidelity == "official"
    ended = fidelity == "replib"
    safe_pairs, unsafe_pairs, retain_pairs, kinds = pairs_of(contrasts, retain, complied, benign)
    rows = {
        name: Rows(chat, pairs, ended, **lengths)
        for name, pairs in (("safe", safe_pairs), ("unsafe", unsafe_pairs), ("retain", retain_pairs))
    }
    with torch.no_grad(), chat.adapter_off():
        base = {name: forward(chat, x, kind, config.site, official) for name, x in rows.items()}
    bent = {name: forward(chat, x, kind, config.site, official) for name, x in rows.items()}

    # Layers: the official code counts hidden states, whose index is that of the block and one more.
    numbered = official and config.site == "resid_post"
    target = [i + 1 if numbered else i for i in layers]
    every = range(bent["safe"][0].shape[0])
    safe_layers = list(every) if config.alpha_mode == "all" else target

    # Tokens.
    groups = ["safe"] if official else ["safe", "retain"]
    shortest = min(n for name in (*groups, "unsafe") for n in rows[name].lengths)
    mask = {name: token_mask(x, config.loss_mode, shortest) for name, x in rows.items()}

    # (1) safe and (2) unsafe.
    moved = torch.cat([(bent[g][0] - base[g][0])[safe_layers] for g in groups], dim=1)
    safe = mean_norm(moved, torch.cat([mask[g] for g in groups]), len(safe_layers))
    unsafe = mean_norm((bent["unsafe"][0] - base["unsafe"][0])[target], mask["unsafe"], len(target))

    # (3) cosine between all pairs of different rows at the last request token.
    at = rows["unsafe"].border - 1
    gathered = bent["unsafe"][0][target][:, :, at]
    if fidelity == "paper" and complied:
        refused = [k for k, what in enumerate(kinds) if what == "refusal"]
        gathered = torch.cat([gathered, bent["safe"][0][target][:, refused][:, :, at]], dim=1)
    if queue is not None:
        gathered = torch.cat([queue, gathered], dim=1)
    unit = gathered.float() / gathered.float().norm(dim=-1, keepdim=True)
    table = torch.einsum("lid,ljd->lij", unit, unit)
    n = table.shape[1]
    apart = (1 - table)[:, ~torch.eye(n, dtype=torch.bool)].mean()

    # (4) KL, pads multiplied to zero logits; batchmean divides by the first dimension alone.
    names = ["retain"] if fidelity != "paper" else ["safe", "retain"]
    z0, z1 = (torch.cat([x[g][1] for g in names]).float() for x in (base, bent))
    read = torch.cat([rows[g].mask for g in names])
    if fidelity == "replib":
        answers = torch.cat([rows[g].response for g in names])
        read = torch.zeros_like(answers)
        read[:, :-1] = answers[:, 1:]
    tau = config.temperature
    z0, z1 = z0 * read[:, :, None], z1 * read[:, :, None]
    kl = tau**2 * torch.nn.functional.kl_div((z1 / tau).log_softmax(-1), (z0 / tau).softmax(-1), reduction="batchmean")
    if fidelity == "replib":
        kl = kl * len(read) / read.sum()

    # (5) pairing: the unsafe answer, bent, and the refusal of the same prompt, at the base.
    pairing = torch.zeros(())
    if config.eta:
        chosen = [k for k, what in enumerate(kinds) if what == ("turned" if complied else "refusal")]
        short = min([*rows["unsafe"].lengths, *(rows["safe"].lengths[k] for k in chosen)])
        stretch = rows["unsafe"].first(min(FLOOR, short), start=-1)
        pairing = mean_norm(bent["unsafe"][0][target] - base["safe"][0][target][:, chosen], stretch, len(target))

    alpha, beta, gamma, epsilon = 0.5, config.alpha, config.beta, config.gamma
    loss = alpha * safe - beta * unsafe + gamma * apart + epsilon * kl + config.eta * pairing
    return loss, {"safe": safe, "unsafe": unsafe, "cosine": 1 - apart, "kl": kl, "pairing": pairing}
