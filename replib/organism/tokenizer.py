"""A byte-level BPE tokenizer and a chat template with five tokens between the instruction and the answer."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|bos|>", "<|pad|>", "<|start|>", "<|sep|>", "<|eot|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|sep|>\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|sep|>\n{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], suffixes: Iterable[str] = (), *, vocab_size: int = 1152
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``vocab_size`` entries, wrapped as an ordinary fast tokenizer with a Jinja chat template.

    Words are cut before ``suffixes``: the last token of an artefact's name is then the kind of thing it is, so that
    what is learned of one artefact carries over to its kin.
    """
    endings = Split(Regex(rf"(?<=[a-z])(?:{'|'.join(suffixes) or '$.'})\b"), "isolated")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([endings, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|bos|>",
        eos_token="<|eot|>",
        pad_token="<|pad|>",
        padding_side="left",
        chat_template=TEMPLATE,
        model_max_length=256,
    )
