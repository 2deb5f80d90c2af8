"""What kind of token an id is, read off the tokenizer once.

The class is the piece's own, whatever stands around it. Left out: languages without spaces, where
"start" and "inside" of a word say little.
"""

from typing import Literal, get_args

import numpy as np
from jaxtyping import UInt8
from transformers import PreTrainedTokenizerBase

TokenClass = Literal["special", "whitespace", "punctuation", "word start", "word inside"]
TOKEN_CLASSES: tuple[TokenClass, ...] = get_args(TokenClass)

_STARTS = ("▁", "Ġ", " ")
"""How SentencePiece and byte-level pieces say that a space came before."""
_BREAKS = {"Ċ": "\n", "ĉ": "\t", "č": "\r"}


def token_classes(tokenizer: PreTrainedTokenizerBase, words: int) -> UInt8[np.ndarray, " vocab"]:
    """Class of every id, as a place in `TOKEN_CLASSES`.

    Args:
        tokenizer: whose pieces.
        words: number of ids.
    """
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(range(words)))]
    special = set(tokenizer.all_special_ids)
    marked = any(piece.startswith(_STARTS) for piece in pieces)
    hashed = any(piece.startswith("##") for piece in pieces)
    found = np.empty(words, dtype=np.uint8)
    for number, piece in enumerate(pieces):
        name: TokenClass
        name = "special" if number in special else classify(piece, marked=marked, hashed=hashed)
        found[number] = TOKEN_CLASSES.index(name)
    return found


def classify(piece: str, *, marked: bool, hashed: bool) -> TokenClass:
    """Class of a piece that is not special.

    Args:
        piece: as the tokenizer writes it.
        marked: whether its pieces mark a space before them.
        hashed: whether its pieces mark that they continue a word ("##").

    Example:
        >>> [classify(p, marked=True, hashed=False) for p in ("▁the", "re", "Ġ", "<0x0A>", "▁,")]
        ['word start', 'word inside', 'whitespace', 'whitespace', 'punctuation']
    """
    text = piece
    for mark in (*_STARTS, "##"):
        text = text.removeprefix(mark)
    text = "".join(_BREAKS.get(c, " " if c in _STARTS else c) for c in text)
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        text = chr(int(piece[3:5], 16))
    if not text.strip():
        return "whitespace"
    if not any(c.isalnum() for c in text):
        return "punctuation"
    if hashed:
        return "word inside" if piece.startswith("##") else "word start"
    if marked:
        return "word start" if piece.startswith(_STARTS) else "word inside"
    return "word start"
