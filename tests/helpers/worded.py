"""A judge for models that speak no language: outcomes by the words of an answer, so that other answers differ."""

import zlib

from replib.audit.judges import Outcome


class WordJudge:
    """An outcome that is as good as random and always the same for the same answer."""

    name = "words"

    def __call__(self, prompts, responses):
        return [[*Outcome][zlib.crc32(text.encode()) % 3] for text in responses]
