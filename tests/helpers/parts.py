"""The parts of an objective put together again, for tests that compare them with a whole."""

from replib.defences.repbend.loss import BendTerms
from replib.defences.repbend.objective import RepBend

LISTS = ("contrasts", "retain", "complied", "safe", "unsafe")


def items_of(*lists):
    """A micro-batch as the trainer draws it: contrasts, retain, complied, safe, unsafe."""
    return dict.fromkeys(LISTS, ()) | dict(zip(LISTS, lists, strict=False))


def sums(objective, chat, items, progress=0.0):
    """Loss and terms of a micro-batch, with their gradients."""
    found = {}
    for part in objective.parts(chat, items, progress):
        for name, x in {"loss": part.loss, **part.terms}.items():
            found[name] = found.get(name, 0) + x
    return found


def bend_terms(chat, items, config, **options):
    """RepBend's terms of a micro-batch."""
    found = sums(RepBend(config, **options), chat, items)
    return BendTerms(**{name: x for name, x in found.items() if name in BendTerms._fields})
