"""What a language model's reply says of two answers: A, B, tie, or nothing that can be told."""

from __future__ import annotations

import re

_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_HALF_THOUGHT = re.compile(r"^.*</think(?:ing)?>|<think(?:ing)?>.*$", re.DOTALL | re.IGNORECASE)

# A capital A may be an article ("Answer: A good reply ..."): no other word comes behind a verdict.
_LETTER = r"[AB]\b(?!['’])(?!\s+(?!(?:because|since|as|over|by)\b)[a-z])"
_TIE = r"(?i:tie)\b"
_HOW = r"(?i:(?:clearly|slightly|much|far|somewhat|overall|definitely|marginally|the|an?|bit|little)\s+)*"
# A line that is a verdict and nothing else: `B`, `**B**`, `[[B]]`, `A tie.`, `The better answer is B`.
_LINE = re.compile(
    r"[\W_]*(?:(?:my|the|overall|final|better|best|verdict|answer|choice|winner|response|boxed|text|is|so|therefore|"
    r"it'?s|it is)[\W_]+)*(a|b|(?:an?[\W_]+)?tie)(?:[^\w:]|_)*",
    re.IGNORECASE,
)
_STATEMENTS = [
    re.compile(pattern)
    for pattern in (
        r"(?i:\b(?:verdict|answer|choice|winner|better|best|one|response|preference))"
        rf"[\W_]*?(?::|\s(?i:is|would\sbe|goes\sto)\b)[\W_]*(?i:answer\s+|an?\s+)?({_LETTER}|{_TIE})",
        rf"\b([AB])\b\**\s+(?i:is|was|seems|looks)\s+{_HOW}(?i:better|best|preferable|stronger|superior|winner)\b",
        r"\b([AB])\b\**\s+wins\b",
        rf"(?i:\b(?:prefer|choose|pick|select|favou?r|vote\sfor|go\swith))\s+(?i:answer\s+)?\**({_LETTER})",
        rf"(?i:\b(?:it'?s|it\sis|this\sis|that'?s|call\sit))\s+(?i:an?\s+)?\**({_TIE})",
        rf"(?i:\b(?:so|therefore|thus|hence))[\s,:]+(?i:answer\s+)?\**({_LETTER}|{_TIE})",
    )
]
_DENIED = re.compile(r"\b(?:not|neither|nor|never|hardly|cannot|whether|if|unless)\b|n['’]t\b", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[.,;:!?\n]")
# The first word, where it is followed by reasons: `B. Answer A is rude`, `A because it is true`.
_FIRST = re.compile(rf"[\W_]*(?i:answer\s+)?([AB]\b|{_TIE})[*_\]]*(?=\s*[.!(\n]|\s+[-–—]|,?\s+(?:because|since|as)\b)")


def read_verdict(reply: str) -> str | None:
    """The verdict of a reply: `a`, `b` or `tie`; None where it says none.

    What stands between `<think>` and `</think>` is no verdict. A last line that is one counts first, then the last
    statement such as `B is better`, then a first word with reasons behind it: the weighing of both answers that comes
    before a verdict names them as well.
    """
    text = _HALF_THOUGHT.sub("", _THOUGHT.sub("", reply)).strip()
    if not text:
        return None
    whole = _LINE.fullmatch(text.splitlines()[-1].strip())
    if whole:
        return _plain(whole[1])
    said = [match for pattern in _STATEMENTS for match in pattern.finditer(text) if not _denied(text, match.start())]
    if said:
        return _plain(max(said, key=lambda match: match.start(1))[1])
    first = _FIRST.match(text)
    if first and not _is_list(text[first.end() :], first[1]):
        return _plain(first[1])
    return None


def _plain(verdict: str) -> str:
    return "tie" if verdict.lower().endswith("tie") else verdict.lower()


def _denied(text: str, start: int) -> bool:
    """Whether the clause says before the statement that it is not so: `I doubt whether B is better`."""
    clause = _CLAUSE_END.split(text[:start])[-1]
    return bool(_DENIED.search(clause))


def _is_list(rest: str, first: str) -> bool:
    """Whether the other answer has a heading of its own: `A. Short and clear` and in the next line `B. Long`."""
    other = {"A": "B", "B": "A"}.get(first)
    return other is not None and bool(
        re.search(rf"\b{other}\s*[:)]|^\W*(?:Answer\s+)?{other}\s*\.", rest, re.MULTILINE)
    )
