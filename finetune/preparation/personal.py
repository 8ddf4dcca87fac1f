"""Find personal data in text: e-mail, phone, card and bank numbers, public IP addresses, keys.

    find("write to ann@example.org")  # [Found(9, 24, "email", "ann@example.org")]

Each kind has a pattern that is cheap to search for, and a check of what it finds: phonenumbers for
phone numbers, the checksums of python-stdnum for cards (Luhn) and IBANs (mod 97), Python's
ipaddress for addresses. Names and postal addresses are not found.
"""

import functools
import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

KINDS = ("key", "email", "iban", "card", "ip", "phone")
"""In this order; what one kind takes, no later kind finds."""
REGIONS = ("US",)
"""Whose national phone numbers are found; numbers with + are found everywhere."""


class Found(NamedTuple):
    """Personal data in a text, and the value by which equal data is recognised."""

    start: int
    end: int
    kind: str
    value: str


_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w.+%'-]{0,63}[\w+%-]@"
    r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24}(?![\w-])"
)
_KEY = re.compile(
    r"""
    -----BEGIN\ (?:[A-Z]+\ )*PRIVATE\ KEY-----.*?(?:-----END\ (?:[A-Z]+\ )*PRIVATE\ KEY-----|\Z)
    | \b(?:
        (?:AKIA|ASIA)[0-9A-Z]{16}                                # Amazon
      | gh[pousr]_[A-Za-z0-9]{36,255} | github_pat_\w{60,}       # GitHub
      | glpat-[\w-]{20,}                                         # GitLab
      | hf_[A-Za-z0-9]{30,}                                      # Hugging Face
      | sk-(?:[a-z]{2,10}-)*[\w-]{20,}                           # OpenAI, Anthropic
      | [srp]k_(?:live|test)_[A-Za-z0-9]{16,}                    # Stripe
      | xox[abeoprs]-[\w-]{10,}                                  # Slack
      | AIza[\w-]{35}                                            # Google
      | npm_[A-Za-z0-9]{36} | pypi-[\w-]{50,} | SG\.[\w-]{16,}\.[\w-]{30,}
      | eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}                 # JSON web token
    )(?![\w-])
    """,
    re.VERBOSE | re.DOTALL,
)
_ASSIGNED = re.compile(
    r"(?:password|passwd|secret|token|api[ _-]?key|access[ _-]?key|private[ _-]?key)[\w-]{0,20}"
    r"[\"']?\s{0,3}(?::=|[:=]|\bis\b)\s{0,3}[\"'`]?([^\s\"'`,;<>]{8,200})",
    re.IGNORECASE,
)
_WORDS = ("passw", "secret", "token", "key")
_KEY_SIGNS = (
    "PRIVATE KEY-----", "AKIA", "ASIA", "gh", "github_pat_", "glpat-", "hf_", "sk-", "k_live_",
    "k_test_", "xox", "AIza", "npm_", "pypi-", "SG.", "eyJ",
)  # fmt: skip
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}")
_CARD = re.compile(r"(?<![\w.-])(?:\d[ -]?){11,18}\d(?![\w-]|\.\d)")
_CARD_ISSUER = re.compile(r"4|5[0-8]|2131|2[2-7]|1800|3|6")
_CARD_WORD = re.compile(r"card|visa|maestro|credit|debit|amex", re.IGNORECASE)
_IP4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_IP6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_VERSION = re.compile(r"(?:version|release|build|ver\.?|\bv)\s*$", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?<![\w.,/:=&#$€£%@-])\+?\(?\d(?:[ ().\-/\u2013]{0,3}\d){6,16}"
    r"(?:[ ,]{0,2}(?:x|ext\.?) ?\d{1,6})?(?![\w%@]|[.,:/]\d)"
)
_CALL = re.compile(  # right before a number
    r"\b(?:phone|telephone|tel|mobile|cell|fax|call|dial|text|sms|whatsapp|"
    r"(?:my|our|your|his|her|their|contact) number)\b"
    r"(?:[ -]?(?:number|no|us|me|him|her|them|at|on|is))*[^\w=$<>]{0,6}$",
    re.IGNORECASE,
)
_NEAR = re.compile(  # anywhere before
    r"phone|\b(?:tel|mobile|cell|fax|call(?:ed|ing)?|dial|text|sms|messages?|whatsapp|hotline"
    r"|contact|reach|answering)\b",
    re.IGNORECASE,
)
_LABEL = re.compile(r"[\s,(-]{1,3}(?:fax|mobile|cell|office|home|work|phone|tel)\b", re.IGNORECASE)
_NO_PHONE = re.compile(
    r"(?:(?:19|20)\d\d[-./ ]\d{1,2}[-./ ]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./](?:19|20)?\d\d)(?= |$)"
    r"|\d{4} ?[-/\u2013] ?\d{4}$|\d{3}-\d\d-\d{4}$"  # dates, years, social security numbers
    r"|.*(?:19|20)\d\d ?[-\u2013] ?(?:19|20)\d\d\b|.* [-/\u2013] "  # subtractions, divisions
)
_SEPARATED = re.compile(r"\d[ ().\-/\u2013]+\d")


def find(text: str, kinds: Sequence[str] = KINDS, regions: Sequence[str] = REGIONS) -> list[Found]:
    """Return the personal data of a text, in order, without overlaps."""
    found: list[Found] = []
    for kind in KINDS:
        if kind in kinds:
            for each in FINDERS[kind](text, regions):
                if all(each.end <= other.start or each.start >= other.end for other in found):
                    found.append(each)
    return sorted(found)


def _has_digits(text: str, least: int) -> bool:
    """Return False where a pattern cannot match: counting is ten times as fast as searching."""
    return not text.isascii() or sum(map(text.count, "0123456789")) >= least


def _emails(text: str, regions: Sequence[str]) -> Iterator[Found]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield Found(*match.span(), "email", match[0].lower())


def _keys(text: str, regions: Sequence[str]) -> Iterator[Found]:
    if any(sign in text for sign in _KEY_SIGNS):
        for match in _KEY.finditer(text):
            yield Found(*match.span(), "key", match[0])
    lower = text.lower()
    for match in _ASSIGNED.finditer(text) if any(each in lower for each in _WORDS) else ():
        value = match[1].rstrip(".)]}!?")
        classes = sum(bool(re.search(each, value)) for each in ("[a-z]", "[A-Z]", r"\d", r"[^\w]"))
        if classes >= 3 or (classes == 2 and len(value) >= 16 and re.search(r"\d", value)):
            yield Found(match.start(1), match.start(1) + len(value), "key", value)


def _ibans(text: str, regions: Sequence[str]) -> Iterator[Found]:
    from stdnum import iban

    for match in _IBAN.finditer(text) if _has_digits(text, 6) else ():
        for end in range(len(match[0]), 14, -1):  # words in capitals may follow
            part = match[0][:end]
            if part[-1] not in " -" and iban.is_valid(part, check_country=False):
                value = iban.compact(part)
                yield Found(match.start(), match.start() + end, "iban", value)
                break


def _cards(text: str, regions: Sequence[str]) -> Iterator[Found]:
    from stdnum import luhn

    for match in _CARD.finditer(text) if _has_digits(text, 12) else ():
        groups = re.split("[ -]", match[0])
        digits = "".join(groups)
        if len(groups) > 1 and (max(map(len, groups)) > 6 or {" ", "-"} <= set(match[0])):
            continue  # a calculation, a list
        if not (_CARD_ISSUER.match(digits) and luhn.is_valid(digits)):
            continue
        if len(digits) >= 14 or _CARD_WORD.search(text, max(0, match.start() - 40), match.start()):
            yield Found(*match.span(), "card", digits)


def _addresses(text: str, regions: Sequence[str]) -> Iterator[Found]:
    patterns = [_IP4] if text.count(".") >= 3 else []
    patterns += [_IP6] if text.count(":") >= 2 else []
    for pattern in patterns:
        for match in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(match[0])
            except ValueError:
                continue
            if address.is_global and not _VERSION.search(
                text[max(0, match.start() - 12) : match.start()]
            ):
                yield Found(*match.span(), "ip", address.compressed)


def _phones(text: str, regions: Sequence[str]) -> Iterator[Found]:
    """Yield phone numbers.

    Possible ones with +; in groups, valid ones of `regions`, and of any country near a word such as
    contact; and any number of at least 7 digits right after a word such as call.
    """
    for match in _NUMBER.finditer(text) if _has_digits(text, 7) else ():
        (start, end), number = match.span(), match[0]
        digits = re.sub(r"\D", "", number)
        if _NO_PHONE.match(number) or len(set(digits)) <= 2:
            continue
        grouped = _SEPARATED.search(number) is not None
        if number.startswith("+"):
            is_phone = _is_possible(number)
        elif _CALL.search(text, max(0, start - 40), start):
            is_phone = True
        else:
            near = _NEAR.search(text, max(0, start - 40), start) or _LABEL.match(text, end)
            is_phone = grouped and (
                _is_valid(number, tuple(regions)) or bool(near and _is_valid(number))
            )
        if is_phone:
            yield Found(start, end, "phone", digits)


def _is_possible(number: str) -> bool:
    """Return whether a number with + has a country's code and a length that it has."""
    import phonenumbers

    try:
        return bool(phonenumbers.is_possible_number(phonenumbers.parse(number)))
    except phonenumbers.NumberParseException:
        return False


@functools.lru_cache(10_000)
def _is_valid(number: str, regions: tuple[str, ...] = ()) -> bool:
    """Return whether a number is one of these countries, by default of any."""
    import phonenumbers

    for region in regions or sorted(phonenumbers.SUPPORTED_REGIONS):
        try:
            parsed = phonenumbers.parse(number, region)
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_valid_number(parsed):
            return True
    return False


FINDERS: dict[str, Callable[[str, Sequence[str]], Iterator[Found]]] = {
    "key": _keys,
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "ip": _addresses,
    "phone": _phones,
}
