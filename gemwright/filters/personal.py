"""Personal information in text: e-mail addresses, phone numbers, cards, IBANs, IP addresses, national ids.

The reports filter certain personal information from the text of pre-training (Gemma 2, arXiv 2408.00118, as
Gemma 1, arXiv 2403.08295, did) and do not say what or how, so what is looked for here is our choice.
It is what has a form that can be proved: a checksum, a registry of lengths or prefixes, a numbering plan.
Names and postal addresses have none, and are left alone. A form that ordinary numbers take as well (eleven
digits in a row) counts only next to a word that says what it is. What names nobody by rule is no find:
private and documentation addresses, numbers of no plan, a card that fails Luhn.

A document costs a few passes of cheap patterns, one of which stops where six digits stand close together. The
dear ones, and `phonenumbers` above all, see only what is around such a place. No find goes on in a next line.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from phonenumbers import SUPPORTED_REGIONS, Leniency, PhoneNumberMatcher

KINDS = ("email", "phone", "card", "iban", "ip", "national_id")

PLACEHOLDERS = {
    "email": "<email>",
    "phone": "<phone>",
    "card": "<card>",
    "iban": "<iban>",
    "ip": "<ip>",
    "national_id": "<national id>",
}
"""How manuals write what a reader fills in, so that the sentence around it stays one. No digit and no @ is in
them, so nothing is found in them again; they are words, for which any tokenizer has pieces (three or four of
Gemma's, none a control token); and each has one spelling, so that a later stage can count or mask it."""


@dataclass(frozen=True)
class Found:
    """One piece of personal information: its kind, and its place in characters of the text."""

    kind: str
    start: int
    stop: int


Span = tuple[int, int]


def find(text: str, *, regions: tuple[str, ...] = ("US", "GB")) -> list[Found]:
    """Everything of the six kinds, by place, without overlaps; of two that overlap the better proved one.

    Args:
        regions: whose phone numbers are known when written without a country code (ISO 3166, two letters).
    Raises:
        ValueError: a region that `phonenumbers` does not know.
    """
    if not SUPPORTED_REGIONS.issuperset(regions):
        unknown = ", ".join(sorted(set(regions) - SUPPORTED_REGIONS))
        raise ValueError(
            f"no numbering plan is known for the region {unknown}. Regions are ISO 3166 codes of two capital "
            "letters, such as US, or GB for the United Kingdom."
        )
    windows = list(_windows(text))
    spans = [("email", span) for span in _emails(text)]
    for kind, finder in (("iban", _ibans), ("card", _cards)):
        spans += [(kind, span) for window in windows for span in finder(text, *window)]
    spans += [("ip", span) for span in _ips(text)]
    spans += [("national_id", span) for window in windows for span in _national_ids(text, *window)]
    spans += [("phone", span) for window in windows for span in _phones(text, *window, regions)]
    taken = bytearray(len(text) if spans else 0)
    found: list[Found] = []
    for kind, (start, stop) in spans:
        if 1 not in taken[start:stop]:
            taken[start:stop] = b"\1" * (stop - start)
            found.append(Found(kind, start, stop))
    return sorted(found, key=lambda one: one.start)


def redact(text: str, *, regions: tuple[str, ...] = ("US", "GB")) -> tuple[str, dict[str, int]]:
    """The text with a placeholder for every find, and how many there were of each kind that occurred.

    Done until nothing is left: a number that ran into another may be one of its own without it. It ends,
    because every find has a digit or an @, and no placeholder has.

    Raises:
        ValueError: a region that `phonenumbers` does not know.
    """
    counts: Counter[str] = Counter()
    while found := find(text, regions=regions):
        counts.update(one.kind for one in found)
        parts: list[str] = []
        end = 0
        for one in found:
            parts += [text[end : one.start], PLACEHOLDERS[one.kind]]
            end = one.stop
        text = "".join(parts) + text[end:]
    return text, dict(counts)


# Every number but an IP address has six digits, and six such have at most 6 other characters between two.
_DENSE = re.compile(r"[0-9](?:[^0-9\n]{0,6}[0-9]){5,}")
_BEFORE, _AFTER = 8, 42  # a tax code's letters come before its digits; the longest IBAN, in fours


def _windows(text: str) -> Iterator[Span]:
    """Where numbers may be: around digits that stand close together; as one where two meet, to cut none."""
    start = stop = -1
    for dense in _DENSE.finditer(text):
        if dense.start() - _BEFORE > stop:
            if stop >= 0:
                yield start, stop
            start = max(0, dense.start() - _BEFORE)
        stop = min(len(text), dense.end() + _AFTER)
    if stop >= 0:
        yield start, stop


def _near(words: re.Pattern[str], text: str, start: int, stop: int) -> bool:
    """Whether one of the words stands up to 40 characters before, or 16 after."""
    return bool(words.search(text, max(0, start - 40), start) or words.search(text, stop, stop + 16))


# ASCII and European letters, for in Chinese no space parts an address from the sentence around it.
_LETTER = "A-Za-z0-9À-ɏ"
_LOCAL = re.compile(rf"[{_LETTER}_.+%'-]+\Z")
_DOMAIN = re.compile(
    rf"(?:[{_LETTER}](?:[{_LETTER}-]{{0,61}}[{_LETTER}])?\.)+(xn--[a-z0-9-]{{2,59}}|[A-Za-z]{{2,24}})"
    rf"(?![{_LETTER}]|_\w|-[0-9]|[(\[])"
)
# Attributes behind a matrix product without spaces, and icon@2x.png: ends of code, and of no domain.
_NO_DOMAIN = re.compile(
    "weights?|bias|grad|data|values?|array|matrix|inv|real|imag|conj|diag|png|jpe?g|gif|svg"
)


def _emails(text: str) -> Iterator[Span]:
    at = text.find("@")
    while at >= 0:
        if (local := _LOCAL.search(text, max(0, at - 65), at)) and (domain := _DOMAIN.match(text, at + 1)):
            start = local.end() - len(local[0].lstrip(".'-%"))
            top = domain[1]
            if (
                0 < at - start <= 64
                and text[start - 1 : start] not in ("%", "}", "$")  # a template's, such as %s@example.com
                and top in (top.lower(), top.upper(), top.title())
                and not _NO_DOMAIN.fullmatch(top)
                and text[start:at] != "git"  # git@github.com:owner/name names a repository
            ):
                yield start, domain.end()
        at = text.find("@", at + 1)


# SWIFT's registry (ISO 13616): what follows the check digits; n digits, a letters, c either.
_IBANS = """
AD8n12c AE19n AL8n16c AT16n AZ4a20c BA16n BE12n BG4a6n8c BH4a14c BI23n BR23n1a1c BY4c4n16c CH5n12c CR18n
CY8n16c CZ20n DE18n DJ23n DK14n DO4c20n EE16n EG25n ES20n FI14n FK2a12n FO14n FR10n11c2n GB4a14n GE2a16n
GI4a15c GL14n GR7n16c GT24c HN4a20n HR17n HU24n IE4a14n IL19n IQ4a15n IS22n IT1a10n12c JO4a4n18c KW4a22c
KZ3n13c LB4n20c LC4a24c LI5n12c LT16n LU3n13c LV4a13c LY21n MC10n11c2n MD20c ME18n MK3n10c2n MN16n MR23n
MT4a5n18c MU4a19n3a NI4a20n NL4a10n NO11n OM3n16c PK4a16c PL24n PS4a21c PT21n QA4a21c RO4a16c RS18n RU14n15c
SA2n18c SC4a20n3a SD14n SE20n SI15n SK20n SM1a10n12c SO19n ST21n SV4a20n TL19n TN20n TR6n16c UA6n19c VA18n
VG4a16n XK16n YE4a4n18c"""
_SET = {"n": "[0-9]", "a": "[A-Z]", "c": "[A-Z0-9]"}
_ACCOUNT = {
    country: re.compile("".join(f"{_SET[kind]}{{{n}}}" for n, kind in re.findall(r"(\d+)(\D)", form)))
    for country, form in re.findall(r"([A-Z]{2})(\w+)", _IBANS)
}
# Looked ahead, here and for cards, so that one that follows a lookalike is not swallowed by it.
_IBAN = re.compile(
    r"(?<!\w)(?=([A-Z]{2} ?[0-9]{2}(?:[ \xa0-]?[A-Z0-9]){11,30}))[A-Z]{2}", re.IGNORECASE | re.ASCII
)


def _ibans(text: str, start: int, stop: int) -> Iterator[Span]:
    for match in _IBAN.finditer(text, start, stop):
        places = [place for place in range(*match.span(1)) if text[place].isalnum()]
        run = "".join(text[place] for place in places).upper()
        if not (form := _ACCOUNT.get(run[:2])) or not (account := form.match(run, 4)):
            continue
        end = places[account.end() - 1] + 1
        digits = "".join(str(int(letter, 36)) for letter in account[0] + run[:4])
        if int(digits) % 97 == 1 and (end == len(text) or not text[end].isalnum()):
            yield match.start(), end


# Bare, or in fours (the last group may be shorter, and a 19-digit number has one more), or 4-6-5 and 4-6-4.
_CARD = re.compile(
    r"(?<!\w)(?<![0-9]\.)(?=([0-9]{13,19}|[0-9]{4}([ .\xa0\u2010-\u2015-])"
    r"(?:(?P<fours>[0-9]{4}\2[0-9]{4}\2[0-9]{1,4})(?:\2[0-9]{3})?|[0-9]{6}\2[0-9]{4,5}))(?!\w|\.[0-9]))[0-9]+",
    re.ASCII,
)
_ISSUED = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|(?:30[0-5]\d|3095|36\d\d|3[89]\d\d)\d{10,15}"  # Diners Club
    r"|(?:6011|64[4-9]\d|65\d\d|62\d\d|81\d\d|352[89]|35[3-8]\d)\d{12,15}"  # Discover, UnionPay, JCB
    r"|(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{9,15}"  # Maestro
    r"|(?:220[0-4]\d{12,15}|(?:508\d|60\d\d)\d{12})"  # Mir, RuPay
)
_BARCODE = re.compile(r"\b(?:EAN|GTIN|UPC|barcode)", re.IGNORECASE)  # 13 digits too, German ones begin with 4


def _cards(text: str, start: int, stop: int) -> Iterator[Span]:
    for match in _CARD.finditer(text, start, stop):
        for end in (match.end(1), match.end("fours")):  # the second is without the security code after it
            digits = re.sub(r"\D", "", text[match.start() : max(0, end)])
            if _ISSUED.fullmatch(digits) and _luhn(digits) and not _near(_BARCODE, text, match.start(), end):
                yield match.start(), end
                break


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812: the doubled digits, from the right every second, count by their digit sum."""
    return sum(map(int, digits[-1::-2])) % 10 == -sum(int(d) * 2 - 9 * (d > "4") for d in digits[-2::-2]) % 10


# The characters before are looked at after the first one, which alone decides almost everywhere.
_IP_V4 = re.compile(
    r"[0-9](?<![\w.].)(?<![A-Za-z][/-].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?!\w|\.[0-9]|[+-][A-Za-z])", re.ASCII
)
_IP_V6 = re.compile(
    r"[23:](?<![\w.:].)(?:(?<=[23])[0-9A-F]{3}|(?<=:):ffff)"
    r"(?::[0-9A-F:]*(?<=:)(?:[0-9]{1,3}\.){3}[0-9]{1,3}|:[0-9A-F:]+)(?!\w)",
    re.ASCII | re.IGNORECASE,
)
# Before a dotted number that is no address: version 1.2.3.4, pkg>=1.2.3.4, versions 1.2.3.4 and 1.2.3.5
_VERSION = re.compile(
    r"(?:(?<![^\W_])(?:v\.|vers?|releases?|rev|builds?|firmware)|versions?(?: is| number)?|[=<>~!]=)"
    r"(?![^\W_])[ \t_.:=`'\"(]*(?:[0-9.]+(?:,| and| or| to|-) +)?\Z",
    re.ASCII | re.IGNORECASE,
)
# Before one that counts sections, as its small parts say: the start of a line, if words follow, or this
_SECTION = re.compile(
    r"(?:\b(?:sections?|sec\.?|chapters?|clauses?|oid) |§ ?)\"?(?:[0-9.]+(?:,| and| or| to) )?\Z", re.I
)
_DOCUMENTATION = ipaddress.ip_network("3fff::/20")  # RFC 9637, which older Pythons do not know
_LINE_START, _HEADING = re.compile(r"^[ \t#*]*\Z", re.MULTILINE), re.compile(r"\.?[ \t]+[A-Z]")


def _ips(text: str) -> Iterator[Span]:
    for match in _IP_V6.finditer(text):
        address = match[0] if match[0].endswith("::") else match[0].rstrip(":")
        # fewer than three groups are a network's prefix at most, and elsewhere a slice: [2024::2]
        if len(re.findall(r"\w+", address)) >= 3 and _public(address):
            yield match.start(), match.start() + len(address)
    for match in _IP_V4.finditer(text):
        start, stop = match.span()
        section = all(int(part) < 30 for part in match[0].split(".")) and (
            _SECTION.search(text, max(0, start - 40), start)
            or (_LINE_START.search(text, max(0, start - 8), start) and _HEADING.match(text, stop))
        )
        if not section and _public(match[0]) and not _VERSION.search(text, max(0, start - 40), start):
            yield start, stop


def _public(address: str) -> bool:
    """Whether an address is one that somebody may have: no private, local, documentation or reserved one."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    ip = getattr(ip, "ipv4_mapped", None) or ip  # ::ffff:10.0.0.1 is as private as 10.0.0.1
    return ip.is_global and not (ip.is_multicast or ip in _DOCUMENTATION)


def _weighed(digits: str, weights: Iterable[int]) -> int:
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=False))


def _spanish(number: str) -> bool:
    """DNI and NIE: the letter is the number modulo 23."""
    digits = number[:-1].translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(digits) % 23] == number[-1]


_ODD = dict(zip("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", (
    1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21,
    2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23), strict=True))  # fmt: skip


def _italian(code: str) -> bool:
    """Codice fiscale (decree of 23 December 1976): letters at odd places have values of their own."""
    even = sum(int(c) if c.isdigit() else ord(c) - 65 for c in code[1:15:2])
    return chr(65 + (sum(_ODD[c] for c in code[0:15:2]) + even) % 26) == code[15]


def _polish(digits: str) -> bool:
    """PESEL: a date of birth, whose month tells the century, and one check digit."""
    return (
        1 <= int(digits[2:4]) % 20 <= 12
        and 1 <= int(digits[4:6]) <= 31
        and not (_weighed(digits, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)) % 10)
    )


def _french(number: str) -> bool:
    """NIR: 97 less the number modulo 97; Corsica's departments 2A and 2B count as 19 and 18."""
    digits = number.replace("2A", "19").replace("2B", "18")
    return int(digits[:13]) % 97 == 97 - int(digits[13:])


def _german(digits: str) -> bool:
    """Tax id: one digit comes two or three times among the first ten; then ISO 7064 modulo 11, 10."""
    product = 10
    for digit in digits[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return len(set(digits[:10])) in (8, 9) and (11 - product) % 10 == int(digits[10])


def _dutch(digits: str) -> bool:
    """BSN: weights 9 to 2 and -1, a multiple of eleven."""
    return int(digits) > 0 and _weighed(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0


def _brazilian(digits: str) -> bool:
    """CPF: two check digits, modulo eleven."""
    return len(set(digits)) > 1 and all(
        _weighed(digits, range(n + 1, 1, -1)) * 10 % 11 % 10 == int(digits[n]) for n in (9, 10)
    )


# Form, what else must hold of the characters without marks, and a word that must be near where both are weak.
_NATIONAL_IDS = [
    (re.compile(rf"(?<![\w-])(?<!\d[.,])(?:{form})(?![\w-]|[.,]\d)", re.ASCII), valid, re.compile(word, re.I))
    for form, valid, word in (
        # United States: areas, groups and serials that exist, less two numbers that advertisements printed
        (r"(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000|(?<=078-05-)1120|(?<=219-09-)9999)\d{4}", bool, ""),
        # United Kingdom: a National Insurance number has no check digit, but prefixes that are never given
        (r"(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z](?: ?\d\d){3} ?[A-D]", bool, ""),
        (r"(?:[XYZ]-?\d|\d\d)\.?\d{3}\.?\d{3}-?[A-Z]", _spanish, ""),
        # any of the seven digits may have become a letter, to tell two people apart
        (r"(?i:[A-Z]{6}[\dLMNP-V]{2}[A-EHLMPRST][\dLMNP-V]{2}[A-Z][\dLMNP-V]{3}[A-Z])", _italian, ""),
        (r"[12] ?\d\d ?(?:0[1-9]|1[0-2]) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d", _french, ""),
        (r"\d{3}\.\d{3}\.\d{3}-\d\d", _brazilian, ""),
        (r"\d{11}", _polish, "PESEL"),
        (r"[1-9]\d ?\d{3} ?\d{3} ?\d{3}", _german, r"\b(?:steuer|id-?nr|tax id|tin\b)"),
        (r"\d{4}\.?\d\d\.?\d{3}", _dutch, r"\b(?:bsn|burgerservice|sofi)"),
    )
]


def _national_ids(text: str, start: int, stop: int) -> Iterator[Span]:
    for form, valid, word in _NATIONAL_IDS:
        for match in form.finditer(text, start, stop):
            if valid(re.sub(r"[ .-]", "", match[0]).upper()) and _near(word, text, *match.span()):
                yield match.span()


_PHONE = re.compile(
    r"(?<![^\W_])(?<![0-9:][.:/])(?!(?:19|20)[0-9]{2}([./-])[0-9]{2}\1[0-9]{2}(?![0-9]))"  # no date
    r"\(?\+?\(?[0-9](?:[ \xa0./()\u2010-\u2015-]{0,4}[0-9]){6,40}"
    r"(?:[ ,]*(?:ext|extension|x)[.:]? ?[0-9]{1,6})?(?![^\W_])",
    re.ASCII,
)
_DECIMAL = re.compile(r"(?!\+[1-9][0-9]{,2}\.[0-9]{7,12}\Z)\+?[0-9]+\.[0-9]+")  # registrars: +44.2079460958
_NUMBERS = re.compile(r"[1-9][0-9]*|[0-9 ]{24,}")  # one without a leading 0, or a row of a table
_PHONE_WORD = re.compile(
    r"\b(?:t[eé]l(?:\b|[eé][fp])|(?:cell|smart)?phone|mobile?\b|cell\b|fax|call\b|dial\b|ring\b|whatsapp|sms\b)"
    r"|[☎☏📞📱]",
    re.IGNORECASE,
)


def _phones(text: str, start: int, stop: int, regions: tuple[str, ...]) -> Iterator[Span]:
    """A + is proof enough of any number of a possible length, and a word such as "phone" of a valid one.

    Otherwise the digits must be grouped as their country groups them or, undivided, begin with its 0: of ten
    digits in a row many are a valid number of the United States, 2147483647 among them.
    """
    for match in _PHONE.finditer(text, start, stop):
        number, places = match[0], regions
        if _DECIMAL.fullmatch(number):
            continue
        if "+" in number:  # the country code says whose plan it follows
            leniency, places = Leniency.POSSIBLE, (None,)
        elif _near(_PHONE_WORD, text, *match.span()):
            leniency = Leniency.VALID
        elif _NUMBERS.fullmatch(number):
            continue
        else:
            leniency = Leniency.STRICT_GROUPING
        for first, part in _readings(number):
            hits = [hit for place in places for hit in PhoneNumberMatcher(part, place, leniency=leniency)]
            for hit in hits:
                raw, at = hit.raw_string, match.start() + first
                if leniency != Leniency.STRICT_GROUPING or not _NUMBERS.fullmatch(raw):
                    around = raw[0] == "(" and raw.count("(") > raw.count(")")  # (or 212-555-1234)
                    yield at + hit.start + around, at + hit.end
            if hits:
                break


def _readings(number: str) -> list[tuple[int, str]]:
    """A run of digits, then what it is without a short number before or after: in 1999 (212) 555-1234."""
    body = re.fullmatch(r"(?:[0-9]{1,4}[.)]? +)?(.*?)(?:[.)]? +[0-9]{1,4})?", number)
    assert body, number
    first, last = body.span(1)
    ends = [(0, len(number)), (0, last), (first, len(number)), (first, last)]
    return [(a, number[a:b]) for a, b in dict.fromkeys(ends) if b - a >= 7]
