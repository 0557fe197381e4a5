"""Masks personal data and secrets: found by form, confirmed by check digits and by the words around.

Every kind is one `_Kind`: a regular expression and a test of the match. A value becomes `<EMAIL_1>`: readable, typed,
and the same for the same value everywhere in a row. Everything else stays as it is. ASCII digits and letters only;
`UnicodeStep` makes full-width ones half-width, so it comes first.
"""

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal, get_args

from pydantic import Field

from rlhf.data.cleaning.base import Row, StepConfig, StepResult, map_texts, texts_of

PiiName = Literal[
    "PRIVATE_KEY", "API_KEY", "EMAIL", "IBAN", "CN_ID", "BANK_CARD", "SSN", "PHONE", "IPV4", "IPV6"
]  # in the order in which they claim characters

_CONTEXT = 24  # characters before a match that are read for hints
# Numbers that are no personal data although they look it.
_NUMBER_OF = re.compile(
    r"(?:(?<![A-Za-z])(?:order|tracking|invoice|ticket|serial|sku|isbn|issn|doi|part|model|item|batch|reference|ref|txn|"
    r"transaction|timestamp)|订单|单号|运单|快递|流水|编号|序列|型号|批次|发票|时间戳|工单)"
    r"(?:[\s:：#.=]|number|num|no|id|code|is|was|号码|号|为|是|码)*$|[#№$¥€£￥]\s?$",
    re.IGNORECASE,
)
_CALL = re.compile(
    r"(?:phone|tel|call|mobile|cell|fax|whatsapp|text|sms|contact|dial|reach|ring|number is|"
    r"电话|手机|致电|拨打|联系|座机|热线|传真|来电|微信|号码)"
    r"[^\n.;。；]{0,16}$",
    re.IGNORECASE,
)
_VERSION = re.compile(
    r"(?:\b(?:version|ver|v|release|build|firmware|section|chapter|clause|rev|python|chrome|driver)|版本|固件|章节|第)"
    r"[.:：]?\s*(?:no\.?\s*)?$|[A-Za-z]/$",
    re.IGNORECASE,
)
_UNIT_AFTER = re.compile(
    r"\s?(?:元|美元|欧元|日元|万|亿|人|次|个|年|%|percent|dollars|euros|usd|rmb|km|kg|bytes|ms\b)", re.IGNORECASE
)
_ARITHMETIC_BEFORE = re.compile(r"(?:[\d)\]}=*/^×÷]|(?<![A-Za-z])[a-z])\s*$")
_SSN_WORDS = re.compile(r"(?:ssn|social security)[^\n]{0,20}$", re.IGNORECASE)


@dataclass(frozen=True)
class _Kind:
    """How one kind of value is found.

    Attributes:
        pattern: finds candidates; the group `value`, where there is one, is what is masked.
        hint: what a text must match to hold one at all; cheap, tested first.
        check: (match, text) -> the part to mask as (start, end), or None where it is something else.
        key: a value's identity: the same number written in two ways gets one placeholder.
    """

    pattern: re.Pattern[str]
    hint: re.Pattern[str]
    check: Callable[[re.Match[str], str], tuple[int, int] | None]
    key: Callable[[str], str] = str


class PiiStep(StepConfig):
    """Masks personal data and secrets."""

    step: Literal["pii"] = "pii"
    kinds: list[PiiName] = Field(default=list(get_args(PiiName)), min_length=1, description="What is masked.")


def pii_step(rows: Sequence[Row], config: PiiStep) -> StepResult:
    """Masks every row; drops none. Report: `changed` rows and placed `masks` by kind."""
    changed, masks, out = 0, dict.fromkeys(config.kinds, 0), []
    for row in rows:
        new, counts = mask_row(row, config)
        out.append(new)
        changed += bool(counts)
        for kind, count in counts.items():
            masks[kind] += count
    return StepResult(out, list(range(len(out))), [], {"changed": changed, "masks": masks})


def mask_row(row: Row, config: PiiStep | None = None) -> tuple[Row, dict[PiiName, int]]:
    """Masks the texts of one row.

    Returns:
        The row, a copy if anything was found; how many values of each kind were masked. Masking the result again
        changes nothing.
    """
    config = config or PiiStep()
    if not any(_ANY_HINT.search(text) for text in texts_of(row, config.columns)):
        return row, {}
    counts: dict[PiiName, int] = {}
    numbers: dict[tuple[str, str], str] = {}
    taken = {found for text in texts_of(row) for found in _PLACEHOLDER.findall(text)}

    def mask(text: str) -> str:
        # A mask can free its neighbour: `a@b.com13800138000` is no phone number until the address is gone.
        while found := find_pii(text, config.kinds):
            for kind, *_ in found:
                counts[kind] = counts.get(kind, 0) + 1
            text = _replaced(text, found, numbers, taken)
        return text

    return map_texts(row, mask, config.columns), counts


def _replaced(
    text: str, found: list[tuple[PiiName, int, int]], numbers: dict[tuple[str, str], str], taken: set[str]
) -> str:
    pieces, at = [], 0
    for kind, start, end in found:
        key = (kind, _KINDS[kind].key(text[start:end]))
        if key not in numbers:
            number = 1
            while f"<{kind}_{number}>" in taken:
                number += 1
            numbers[key] = f"<{kind}_{number}>"
            taken.add(numbers[key])
        pieces += [text[at:start], numbers[key]]
        at = end
    return "".join([*pieces, text[at:]])


def find_pii(text: str, kinds: Sequence[PiiName] = get_args(PiiName)) -> list[tuple[PiiName, int, int]]:
    """Finds personal data in one text.

    Returns:
        (kind, start, end) in text order, without overlaps; where two kinds claim the same characters, the one that
        stands first in `PiiName`.
    """
    found: list[tuple[PiiName, int, int]] = []
    if not _ANY_HINT.search(text):
        return found
    for name in get_args(PiiName):
        kind = _KINDS[name]
        if name not in kinds or not kind.hint.search(text):
            continue
        for match in kind.pattern.finditer(text):
            span = kind.check(match, text)
            if span is not None and all(span[1] <= start or span[0] >= end for _, start, end in found):
                found.append((name, *span))
    return sorted(found, key=lambda item: item[1])


def _digits(text: str) -> str:
    return re.sub(r"[^0-9]", "", text)


def _before(match: re.Match[str], text: str) -> str:
    return text[max(0, match.start() - _CONTEXT) : match.start()]


def _whole(match: re.Match[str], text: str) -> tuple[int, int] | None:
    return match.span("value") if "value" in match.re.groupindex else match.span()


def luhn_valid(digits: str) -> bool:
    """The check of ISO/IEC 7812: every second digit from the right is doubled, the digit sum divides by 10."""
    total = sum(int(d) for d in digits[-1::-2]) + sum(sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return total % 10 == 0


def cn_id_valid(number: str) -> bool:
    """The check of GB 11643-1999 (ISO 7064 MOD 11-2) of an 18-character resident number, and its date of birth."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(weight * int(digit) for weight, digit in zip(weights, number[:17], strict=True))
    if "10X98765432"[total % 11] != number[17].upper() or number[:2] not in _PROVINCES:
        return False
    try:
        born = date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    return 1880 <= born.year <= 2100


def iban_valid(iban: str) -> bool:
    """The check of ISO 13616 (MOD 97-10) and the length that the country has registered."""
    if _IBAN_LENGTHS.get(iban[:2]) != len(iban):
        return False
    return int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97 == 1


_PROVINCES = {
    *("11", "12", "13", "14", "15", "21", "22", "23", "31", "32", "33", "34", "35", "36", "37", "41", "42", "43"),
    *("44", "45", "46", "50", "51", "52", "53", "54", "61", "62", "63", "64", "65", "71", "81", "82", "83"),
}
_IBAN_LENGTHS = {
    found[0]: int(found[1])
    for found in re.findall(
        r"([A-Z]{2})(\d\d)",
        "AD24 AE23 AT20 BE16 BG22 CH21 CY28 CZ24 DE22 DK18 EE20 ES24 FI18 FR27 GB22 "
        "GR27 HR21 HU28 IE22 IL23 IS26 IT27 LI21 LT20 LU20 LV21 MC27 MT31 NL18 NO15 "
        "PL28 PT25 RO24 RS22 SA24 SE24 SI19 SK24 SM27 TR26 UA29 BR29 GE22 KZ20 ",
    )
}


def _check_iban(match: re.Match[str], text: str) -> tuple[int, int] | None:
    """The pattern may have run on into the next word, so the number is cut at its country's length."""
    length, end, seen = _IBAN_LENGTHS.get(match.group()[:2], 0), match.start(), 0
    while end < match.end() and seen < length:
        seen += text[end] != " "
        end += 1
    if text[end : end + 1].isascii() and text[end : end + 1].isalnum():
        return None
    return (match.start(), end) if iban_valid(text[match.start() : end].replace(" ", "")) else None


def _check_cn_id(match: re.Match[str], text: str) -> tuple[int, int] | None:
    return match.span() if cn_id_valid(match.group()) else None


_CARD = re.compile(
    r"4\d{15}|4\d{18}|5[1-5]\d{14}|2[2-7]\d{14}|62\d{14,17}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}|6(?:011|4[4-9]\d|5\d\d)\d{12}"
)


def _check_card(match: re.Match[str], text: str) -> tuple[int, int] | None:
    digits = _digits(match.group())
    if not _CARD.fullmatch(digits) or not luhn_valid(digits) or len(set(digits)) < 2:
        return None
    return None if _NUMBER_OF.search(_before(match, text)) else match.span()


def _check_ssn(match: re.Match[str], text: str) -> tuple[int, int] | None:
    before = _before(match, text)
    if "-" not in match.group() and not _SSN_WORDS.search(before):
        return None
    return None if _NUMBER_OF.search(before) else match.span()


# ITU-T E.164 country codes, by first digits.
_COUNTRY = re.compile(
    r"\+(?:1|7|2(?:0|7|[1-6]\d|9[0178])|3(?:[0-4]|6|9|5\d|7\d|8\d)|4(?:[013-9]|2\d)|5(?:[1-8]|0\d|9\d)|"
    r"6(?:[0-6]|[7-9]\d)|8(?:1|2|4|6|5\d|8\d)|9(?:[0-58]|6\d|7\d|9\d))"
)


def _check_phone(match: re.Match[str], text: str) -> tuple[int, int] | None:
    before, after, number = _before(match, text), text[match.end() : match.end() + 12], match.group()
    digits = _digits(number)
    if _NUMBER_OF.search(before) or _UNIT_AFTER.match(after) or digits.endswith("000000"):
        return None
    form = match.lastgroup
    if form == "plain" and not _CALL.search(before):
        return None
    if form == "international" and not (
        9 <= len(digits) <= 15 and _COUNTRY.match(number) and not _ARITHMETIC_BEFORE.search(before)
    ):
        return None
    return match.span()


def _phone_key(value: str) -> str:
    # Without the country code: of China before a mobile number, of North America where it is set off.
    return re.sub(r"^(?:00)?86(?=1\d{10}$)", "", _digits(re.sub(r"^(?:\+1|1(?=\D))", "", value)))


_EMAIL_FILES = re.compile(
    r"\.(?:png|jpe?g|gif|svg|webp|bmp|ico|css|js|ts|py|json|html?|zip|tgz|gz|whl|jar)$", re.IGNORECASE
)


def _check_email(match: re.Match[str], text: str) -> tuple[int, int] | None:
    value = match.group()
    # git@github.com:user/repo is an address of a repository; icon@2x.png is a file.
    if value.lower().startswith("git@") or _EMAIL_FILES.search(value) or ".." in value:
        return None
    return match.span()


# Four small numbers with dots are the version of a program more often than an address, unless the words say otherwise.
_ADDRESS_WORDS = re.compile(
    r"(?:(?<![A-Za-z])(?:ips?|ipv4|address(?:es)?|host|server|ping|ssh|from|client|login|addr|remote|dns|gateway)"
    r"(?![A-Za-z])|地址|服务器|主机|登录|来自)[^\n.;。；]{0,12}$|//$|@$",
    re.IGNORECASE,
)
_SMALLEST_OCTET = 20  # of a first octet that needs no such words
_WELL_KNOWN = {"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "114.114.114.114", "223.5.5.5", "119.29.29.29"}


def _check_ipv4(match: re.Match[str], text: str) -> tuple[int, int] | None:
    value = match.group()
    address = ipaddress.IPv4Address(value)
    harmless = address.is_loopback or address.is_unspecified or address.is_link_local or address.is_multicast
    if harmless or value in _WELL_KNOWN or value.startswith(("255.", "0.", "10.", "192.168.")) or _is_private_b(value):
        return None
    before = _before(match, text)
    if _VERSION.search(before) or (int(value.split(".")[0]) < _SMALLEST_OCTET and not _ADDRESS_WORDS.search(before)):
        return None
    return match.span()


def _is_private_b(value: str) -> bool:
    return value.startswith("172.") and 16 <= int(value.split(".")[1]) <= 31


def _check_ipv6(match: re.Match[str], text: str) -> tuple[int, int] | None:
    value = match.group().rstrip(":")
    try:
        address = ipaddress.IPv6Address(value)
    except ValueError:
        return None
    # 2000::/3, the addresses that are given out; `std::cafe` and times of day are not in it.
    return (match.start(), match.start() + len(value)) if int(address) >> 125 == 1 else None


def _check_key(match: re.Match[str], text: str) -> tuple[int, int] | None:
    span = match.span("value") if match["value"] else match.span()
    value = text[slice(*span)]
    # `sk-` also begins names in style sheets: a key has digits and letters in plenty.
    return span if re.search(r"[0-9]", value) and len(set(value)) >= 10 else None


_A = re.ASCII
_FLAGS = re.ASCII | re.VERBOSE
_KINDS: dict[PiiName, _Kind] = {
    "PRIVATE_KEY": _Kind(
        re.compile(
            r"-----BEGIN (?P<name>[A-Z ]*PRIVATE KEY(?: BLOCK)?)-----"
            r"(?:.*?-----END (?P=name)-----|[A-Za-z0-9+/=\s\\]*)",
            re.DOTALL,
        ),
        re.compile("-----BEGIN"),
        lambda match, text: match.span(),
        lambda value: "".join(value.split()),
    ),
    "API_KEY": _Kind(
        re.compile(
            r"""(?<![A-Za-z0-9_])(?:
            (?:AKIA|ASIA)[A-Z0-9]{16} | gh[pousr]_[A-Za-z0-9]{36,255} | github_pat_\w{22,255}   # AWS, GitHub
            | sk-(?:proj-|ant-|or-|svcacct-)?[A-Za-z0-9_-]{20,250}                              # OpenAI and alike
            | [sr]k_live_[A-Za-z0-9]{16,99} | AIza[\w-]{35} | hf_[A-Za-z0-9]{30,40}             # Stripe, Google, HF
            | xox[abeprs]-[A-Za-z0-9-]{10,250} | glpat-[\w-]{20,64} | LTAI[A-Za-z0-9]{12,24}    # Slack, GitLab, Aliyun
            | eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{16,}                                            # JWT
            | aws_secret_access_key["']?\s{0,3}[:=]\s{0,3}["']?(?P<value>[A-Za-z0-9/+=]{40})
            )(?![A-Za-z0-9_])""",
            _FLAGS,
        ),
        re.compile(r"AKIA|ASIA|gh[pousr]_|github_pat_|sk-|k_live_|AIza|hf_|xox|glpat-|LTAI|eyJ|aws_secret"),
        _check_key,
    ),
    "EMAIL": _Kind(
        re.compile(
            r"(?<![\w.+%@-])[A-Za-z0-9_][\w.+%-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,6}"
            r"[A-Za-z]{2,24}(?![\w@]|-\w)",
            _A,
        ),
        re.compile("@"),
        _check_email,
        str.lower,
    ),
    "IBAN": _Kind(
        re.compile(r"(?<![A-Za-z0-9_])[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]){11,30}", _A),
        re.compile(r"[A-Z]{2}\d\d", _A),
        _check_iban,
        lambda value: value.replace(" ", ""),
    ),
    "CN_ID": _Kind(
        re.compile(r"(?<![A-Za-z0-9_.])[1-8]\d{5}(?:18|19|20)\d{2}[01]\d[0-3]\d\d{3}[\dXx](?![A-Za-z0-9_])", _A),
        re.compile(r"\d{17}", _A),
        _check_cn_id,
        str.upper,
    ),
    "BANK_CARD": _Kind(
        re.compile(
            r"(?<![\w.+-])(?:[2-6]\d{13,18}|[2-6]\d{3}(?P<s>[ -])\d{4}(?P=s)\d{4}(?P=s)\d{4}(?:(?P=s)\d{3})?"
            r"|3[47]\d\d(?P<t>[ -])\d{6}(?P=t)\d{5}|62\d{4}(?P<u>[ -])\d{13})(?![\w]|[.-]\d)",
            _A,
        ),
        re.compile(r"\d{4}", _A),
        _check_card,
        _digits,
    ),
    "SSN": _Kind(
        re.compile(r"(?<![\w.-])(?!000|666|9)\d{3}([ -])(?!00)\d{2}\1(?!0000)\d{4}(?![\w]|[-.]\d)", _A),
        re.compile(r"\d{3}[ -]\d\d[ -]\d{4}", _A),
        _check_ssn,
        _digits,
    ),
    "PHONE": _Kind(
        re.compile(
            r"""(?:
            (?P<mobile>  (?<![\w.+-]) (?:(?:\+|00)86[ -]?)? 1[3-9]\d (?P<m>[ -]?) \d{4} (?P=m) \d{4})
            | (?P<landline> (?<![\w.+-])
                (?: \(0(?:10|2\d|[3-9]\d{2})\)[ ]? | 0(?:10|2\d|[3-9]\d{2})- | \+86[ -]?0?(?:10|2\d|[3-9]\d{2})[ -])
                [2-8]\d{6,7} (?:-\d{1,5})?)
            | (?P<service> (?<![\w.-]) [48]00-\d{3}-\d{4})
            | (?P<us> (?<![\w.+-]) (?:\+?1[ .-]?)? (?: \((?!.11)[2-9]\d{2}\)[ ]? | (?!.11)[2-9]\d{2}[.-])
                (?!.11)[2-9]\d{2} [.-] \d{4})
            | (?P<international> (?<![\w+.]) \+[1-9]\d{0,2} (?:[ .-]?\(0\)|[ .-]?\(\d{1,4}\))? (?:[ .-]?\d{1,5}){2,6})
            | (?P<plain> (?<![\w.+-]) (?: [2-9]\d{2}[ ]?[2-9]\d{2}[ ]?\d{4} | 0(?:10|2\d|[3-9]\d{2})[ ]?[2-8]\d{6,7}
                | 0[1-9](?:[ ]?\d{2}){4} ))
            )(?![\w]|[.-]\d|%)""",
            _FLAGS,
        ),
        re.compile(r"\d{4}|\+\d|\d\d \d\d \d\d", _A),
        _check_phone,
        _phone_key,
    ),
    "IPV4": _Kind(
        re.compile(
            r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?![\w]|[.-]\w)",
            _A,
        ),
        re.compile(r"\d\.\d{1,3}\.\d{1,3}\.\d", _A),
        _check_ipv4,
    ),
    "IPV6": _Kind(
        re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,7}[0-9A-Fa-f]{0,4}(?![\w:.]*\w)", _A),
        re.compile(r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]*:", _A),
        _check_ipv6,
        lambda value: str(ipaddress.IPv6Address(value)),
    ),
}
# One pass over a text without any of these ends the search; it must let through whatever a kind's own hint does.
_ANY_HINT = re.compile(
    r"@|\d{4}|\+\d|\d\d \d\d \d\d|\d\.\d{1,3}\.\d|[23][0-9A-Fa-f]{3}:|-----BEGIN|"
    r"AKIA|ASIA|gh[pousr]_|github_pat_|sk-|k_live_|AIza|hf_|xox|glpat-|LTAI|eyJ|aws_secret",
    _A,
)
_PLACEHOLDER = re.compile(rf"<(?:{'|'.join(get_args(PiiName))})_\d+>")
