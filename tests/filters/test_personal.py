"""What is planted is found, in every spelling; what only looks like it is left alone; redaction is final."""

import ipaddress
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import phonenumbers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemwright.data.sources import SPLITS, Corpus
from gemwright.filters.personal import KINDS, PLACEHOLDERS, Found, find, redact

WORDS = ("the", "of", "river", "quietly", "stone", "morning", "gave", "letter", "who", "had", "Anna", "no.7,")
AROUND = (
    "{}",
    "({})",
    "[{}]",
    "<{}>",
    '"{}"',
    "{},",
    "{}.",
    "{};",
    "**{}**",
    "{}!",
    "地址{}。",
    "\n{}",
    "{}\n",
)


def spans(text: str, **options: tuple[str, ...]) -> list[tuple[str, str]]:
    """Every find as its kind and its text."""
    return [(found.kind, text[found.start : found.stop]) for found in find(text, **options)]


def prose(draw: random.Random, paragraphs: int) -> list[str]:
    """Invented sentences."""
    return [" ".join(draw.choices(WORDS, k=draw.randint(8, 60))) + "." for _ in range(paragraphs)]


def an_email(draw: random.Random) -> str:
    name, other, host = (
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3)
    )
    local = draw.choice(
        [name, f"{name}.{other}", f"{name}_{other}7", f"{name}+{other}", f"{name[0]}-{other}%x", f"o'{name}"]
    )
    below = draw.choice(["", "", "mail.", "eu.mx-2."])
    address = f"{local}@{below}{host}.{draw.choice(['com', 'org', 'co.uk', 'de', 'museum', 'edu.au', 'io'])}"
    return draw.choice([address, address, address.upper()])


def digits(draw: random.Random, count: int) -> str:
    return "".join(draw.choices("0123456789", k=count))


CARDS = "4:16 4:13 4:19 51:16 2345:16 34:15 37:15 6011:16 65:16 36:14 3530:16 62:16 62:19 6759:16 2202:16"


def a_card(draw: random.Random) -> str:
    prefix, length = draw.choice(CARDS.split()).split(":")
    body = prefix + digits(draw, int(length) - len(prefix) - 1)
    (card,) = [body + last for last in "0123456789" if luhn_sum(body + last) % 10 == 0]
    mark = draw.choice(["", " ", "-", "."])
    groups = (4, 6, 5) if len(card) in (14, 15) else (4, 4, 4, 4, 3)
    return mark.join(card[sum(groups[:n]) : sum(groups[: n + 1])] for n in range(len(groups))).rstrip(mark)


def luhn_sum(number: str) -> int:
    """By the definition: every second digit from the right doubled, and the digits of the products added."""
    weighed = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(number))]
    return sum(int(digit) for product in weighed for digit in str(product))


IBANS = "DE:18n GB:4a14n FR:10n11c2n NL:4a10n ES:20n IT:1a10n12c PL:24n BE:12n CH:5n12c MT:4a5n18c IE:4a14n"


def an_iban(draw: random.Random) -> str:
    country, form = draw.choice(IBANS.split()).split(":")
    sets = {"n": "0123456789", "a": "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "c": "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    parts = re.findall(r"(\d+)(\D)", form)
    account = "".join(draw.choice(sets[kind]) for count, kind in parts for _ in range(int(count)))
    number = int("".join(str(int(letter, 36)) for letter in f"{account}{country}00"))
    iban = f"{country}{98 - number % 97:02d}{account}"
    fours = [iban[start : start + 4] for start in range(0, len(iban), 4)]
    return draw.choice([iban, iban.lower(), " ".join(fours), " ".join(fours), "-".join(fours)])


def an_ip(draw: random.Random) -> str:
    if draw.random() < 0.5:
        network = draw.choice(
            ["2001:4860::", "2600:1f00::", "2a00:1450::", "2a02:8100::", "2c0f:f248::", "2404:6800::"]
        )
        low = draw.choice([draw.getrandbits(16) << 16 | draw.getrandbits(16), draw.getrandbits(90)])
        six = ipaddress.IPv6Address(int(ipaddress.IPv6Address(network)) + low)
        return draw.choice([six.compressed, six.compressed, six.exploded, six.compressed.upper()])
    while True:
        four = ipaddress.IPv4Address(draw.getrandbits(32))
        if four.is_global and not four.is_multicast and not four.is_reserved:
            return str(four)


NUMBERS = "US::10 US::10 GB:20:10 GB:7:10 DE:30:9 FR:6:9 IN:98:10"


def a_phone(draw: random.Random) -> str:
    """A valid number of one of five countries, as it is written there or abroad."""
    forms = phonenumbers.PhoneNumberFormat
    kind = draw.choice(NUMBERS.split())
    country, prefix, length = kind.split(":")
    while True:
        national = prefix + digits(draw, int(length) - len(prefix))
        number = phonenumbers.parse(f"+{phonenumbers.country_code_for_region(country)}{national}")
        if phonenumbers.is_valid_number(number):
            break
    abroad = phonenumbers.format_number(number, forms.INTERNATIONAL)
    written = [abroad, abroad.replace(" ", "-"), abroad.replace(" ", "."), f"+{abroad[1:].replace(' ', '')}"]
    if country == "US":
        area, one, two = national[:3], national[3:6], national[6:]
        written += [f"({area}) {one}-{two}", f"({area}){one}-{two}", f"+1 ({area}) {one}-{two}"]
        written += [f"1-{area}-{one}-{two}", f"{area}-{one}-{two} ext. 42"]
        written += [mark.join((area, one, two)) for mark in (" ", "-", ".", " - ")]
    if country == "GB":
        local = phonenumbers.format_number(number, forms.NATIONAL)
        written += [local, local.replace(" ", "-"), f"0{national}", f"+44 (0){national[:4]} {national[4:]}"]
    return draw.choice(written)


PLANTS = {"email": an_email, "phone": a_phone, "card": a_card, "iban": an_iban, "ip": an_ip}
EACH = 80


def plant(paragraphs: list[str], draw: random.Random, *kinds: str) -> tuple[str, list[tuple[str, str]]]:
    """Paragraphs with 80 of each kind between their words, one a paragraph, and what was planted in order."""
    order = [kind for kind in kinds for _ in range(EACH)]
    draw.shuffle(order)
    planted = [(kind, PLANTS[kind](draw)) for kind in order]
    parts: list[str] = []
    for (_, item), paragraph in zip(planted, paragraphs, strict=False):
        words = paragraph.split(" ")
        place = draw.choice([0, len(words), draw.randint(0, len(words))])
        words.insert(place, draw.choice(AROUND).format(item))
        parts.append(" ".join(words))
    return "\n\n".join(parts), planted


@pytest.mark.parametrize("kind", PLANTS)
def test_everything_planted_in_invented_prose_is_found_whole_and_nothing_else(kind: str) -> None:
    draw = random.Random(kind)
    text, planted = plant(prose(draw, EACH), draw, kind)
    assert spans(text) == planted


@pytest.mark.parametrize("book", ["tinyshakespeare.txt", "war_and_peace_2600-0.txt"])
def test_everything_planted_in_a_book_is_found_whole_and_nothing_else(data: Path, book: str) -> None:
    draw = random.Random(book)
    whole = (data / "text" / book).read_text(encoding="utf-8").split("\n\n")
    paragraphs = [paragraph for paragraph in whole if len(paragraph) > 80][: len(PLANTS) * EACH]
    text, planted = plant(paragraphs, draw, *PLANTS)
    assert len(planted) == 400
    assert spans(text) == planted


def test_false_finds_in_shakespeare_are_none_in_40000_lines(data: Path) -> None:
    assert find((data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")) == []


def test_false_finds_in_the_standard_library_are_below_one_in_10000_lines() -> None:
    """Its authors' e-mail addresses, by the ends of real domains, are true finds; the rest are counted."""
    real = re.compile(
        r".*@[\w.-]+\.(com|org|net|edu|gov|io|us|uk|de|nl|fi|se|at|au|nz|ca|fr|it|ch|no|jp|dk|be|cz|hu|pl)"
    )
    corpus = Corpus.standard_library()
    lines, true, false = 0, 0, []
    for split in SPLITS:
        for document in corpus.documents(split):
            if document.id.endswith(".py"):
                lines += document.text.count("\n")
                found = spans(document.text)
                false += [one for one in found if one[0] != "email" or not real.fullmatch(one[1])]
                true += len(found)
    assert lines > 100_000
    assert true - len(false) > 50
    assert len(false) * 10_000 < lines, false


@pytest.mark.parametrize(
    "text",
    [
        "x = a@b", "y = W@x.T + c", "q@k.mT", "scores = q@k.transpose(-2, -1)", "self.w@x.weight",
        "icon@2x.png", "@property\ndef f(self): ...", "@a.b.setter", "git@github.com:owner/name.git",
        "%s@example.com", "{user}@example.com", "lodash@4.17.21", "root@localhost", "sd_IN@devanagari.UTF-8",
        "a @ b.com",
    ],
)  # fmt: skip
def test_an_at_sign_alone_makes_no_address(text: str) -> None:
    assert find(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "d670460b4b4aece5915caf5c68d12f560a9fe3e4", "550e8400-e29b-41d4-a716-446655440000",
        "978-0-306-40615-7", "ISBN 0-306-40615-2", "9780306406157", "2024-01-02T03:04:05.123456",
        "2023-10-05 14:30:22 call", "20231005143022", "1700000000", "1700000000000", "2147483647",
        "4294967295", "6364136223846793005", "4611686018427387904", "3.141592653589793", "0.4111111111111111",
        "2.8333333333...", "Decimal('+35236450.6')", "h * 69069 + 907133923", "0x4111111111111111",
        "1,234,567,890", "1914-1918 1939-1945", "40.712776, -74.005974", "1 2 3 4 5 6 7 8 9 10 11 12",
        ">>> 1234567890 * 2125551234\n2623779678", "2125551234 2125551234 2125551234",
        "doi:10.1038/s41586-020-2649-2",
    ],
)  # fmt: skip
def test_numbers_of_other_kinds_are_left_alone(text: str) -> None:
    assert find(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4", "v1.2.3.4", "1.2.3.4.5", "pkg==1.2.3.4", "pkg >= 1.2.3.4", "Chrome/41.0.227.1",
        "lib-1.2.3.4", '"version": "1.2.3.4"', "__version__ = '1.2.3.4'", "sections 1.2.3.4 and 1.2.3.5",
        "§1.2.3.4", "1.2.3.4-beta", "\n3.2.1.4 Requirements", "12:30:45", "00:1a:2b:3c:4d:5e", "a[2024::2]",
        "std::cout", "a[2001::2, ::ffff]",
    ],
)  # fmt: skip
def test_versions_headings_and_slices_are_no_ip_addresses(text: str) -> None:
    assert find(text) == []


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.178.20", "172.16.9.8", "169.254.1.1", "192.0.2.7", "198.51.100.7",
        "203.0.113.7", "100.64.1.1", "224.0.0.251", "240.1.1.1", "255.255.255.0", "0.0.0.0", "::1", "fe80::1",
        "2001:db8::1:2", "3fff::1:2", "fd12:3456:789a::1", "ff02::1:2", "::ffff:10.0.0.1",
    ],
)  # fmt: skip
def test_an_address_that_names_nobody_is_left_alone(address: str) -> None:
    assert find(f"listen on {address} only") == []


@pytest.mark.parametrize(
    "text", ["[{}]:443", "http://{}/", "ip={}", "<{}>", "{}/24", "from {}.", "{}:", "{}, {}"]
)
@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.4.4"])
def test_an_address_is_found_beside_a_port_a_path_or_a_mask(text: str, address: str) -> None:
    assert set(spans(text.format(address, address))) == {("ip", address)}


@pytest.mark.parametrize(
    "number",
    [
        "4111 1111 1111 1112",
        "1111 1111 1111 1117",
        "9999999999999995",
        "4111 1111-1111 1111",
        "EAN 4222222222222",
    ],
    ids=["Luhn", "no issuer", "no issuer, bare", "mixed marks", "bar code"],
)
def test_a_number_that_only_resembles_a_card_is_left_alone(number: str) -> None:
    assert find(number) == []


def test_a_card_of_thirteen_digits_is_found_where_no_bar_code_is_meant() -> None:
    assert spans("paid with 4222222222222 today") == [("card", "4222222222222")]


def test_a_security_code_or_a_date_after_a_card_is_not_part_of_it() -> None:
    assert spans("5555 5555 5555 4444 123") == [("card", "5555 5555 5555 4444")]
    assert spans("5555-5555-5555-4444 12/27") == [("card", "5555-5555-5555-4444")]


def test_every_single_error_in_an_iban_is_noticed() -> None:
    iban = "GB82WEST12345698765432"
    assert spans(iban) == [("iban", iban)]
    for place in range(4, len(iban)):
        other = "7" if iban[place] != "7" else "3"
        assert not find(iban[:place] + other + iban[place + 1 :])


def test_an_iban_of_the_wrong_length_or_country_is_left_alone() -> None:
    assert find("GB82WEST123456987654321 GB82WEST1234569876543 ZZ82WEST12345698765432") == []


@pytest.mark.parametrize(
    ("true", "false"),
    [
        ("123-45-6789", "123 45 6789"), ("123-45-6789", "000-45-6789"), ("665-45-6789", "666-45-6789"),
        ("123-45-6789", "912-45-6789"), ("123-45-6789", "123-00-6789"), ("123-45-6789", "123-45-0000"),
        ("078-05-1121", "078-05-1120"), ("123-45-6789", "1-123-45-6789"), ("AB 12 34 56 C", "QQ 12 34 56 C"),
        ("AB123456C", "AB123456E"), ("AA123456C", "GB123456C"), ("12345678Z", "12345678A"),
        ("12.345.678-Z", "12.345.679-Z"), ("X1234567L", "X1234567M"), ("Z-1234567-R", "Y-1234567-R"),
        ("RSSMRA85T10A562S", "RSSMRA85T10A562T"), ("rssmra85t10a562s", "rssmra85t10a563s"),
        ("PESEL 44051401359", "PESEL 44051401358"), ("44051401359 (PESEL)", "44051401359"),
        ("PESEL 44051401359", "PESEL 44991401353"), ("2 55 08 14 168 025 38", "2 55 08 14 168 025 39"),
        ("255081416802538", "255081416802539"), ("Steuer-ID 86 095 742 719", "Steuer-ID 86 095 742 718"),
        ("IdNr. 86095742719", "86095742719"), ("BSN 111222333", "BSN 111222334"),
        ("BSN 111222333", "111222333"), ("529.982.247-25", "529.982.247-26"),
        ("529.982.247-25", "111.111.111-11"),
    ],
)  # fmt: skip
def test_a_national_id_is_found_and_its_lookalike_is_not(true: str, false: str) -> None:
    assert [kind for kind, _ in spans(f"it is {true}, he said")] == ["national_id"]
    assert find(f"it is {false}, he said") == []


def test_ten_bare_digits_are_a_phone_number_only_beside_a_word_that_says_so() -> None:
    assert find("it printed 2125551234 and stopped") == []
    assert spans("Phone: 2125551234") == [("phone", "2125551234")]
    assert spans("2125551234 (cell)") == [("phone", "2125551234")]
    assert spans("Tél 2125551234") == [("phone", "2125551234")]


def test_digits_must_be_grouped_as_in_their_country_unless_a_word_says_what_they_are() -> None:
    assert find("rows 21 25 55 12 34 and more") == []
    assert spans("tel 21 25 55 12 34 and more") == [("phone", "21 25 55 12 34")]


@pytest.mark.parametrize("text", ["in 1999 {}", "{} 24 hours a day", "room 12 ({}) 7"])
@pytest.mark.parametrize("number", ["212-555-1234", "020 7946 0958"])
def test_a_short_number_beside_a_phone_number_does_not_hide_it(text: str, number: str) -> None:
    assert spans(text.format(number)) == [("phone", number)]


def test_numbers_of_no_plan_are_left_alone() -> None:
    assert find("call 123-456-7890 or (555) 123-4567") == []


def test_regions_say_whose_numbers_are_known_without_a_country_code() -> None:
    assert find("appelez le 01 42 68 53 00") == []
    assert spans("appelez le 01 42 68 53 00", regions=("FR",)) == [("phone", "01 42 68 53 00")]
    assert spans("+33 1 42 68 53 00, 212-555-1234", regions=()) == [("phone", "+33 1 42 68 53 00")]


def test_an_unknown_region_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"region UK\. Regions are .* GB for the United Kingdom"):
        find("any text", regions=("US", "UK"))


def test_numbers_on_two_lines_are_two_numbers() -> None:
    assert find("4111 1111\n1111 1111") == []
    assert spans("212-555-1234\n646-555-9876") == [("phone", "212-555-1234"), ("phone", "646-555-9876")]


def test_a_find_is_placed_by_characters() -> None:
    assert find("żółw 🐢: jane@example.org") == [Found("email", 8, 24)]


def test_every_kind_has_a_placeholder_of_its_own_in_which_nothing_is_found() -> None:
    assert set(PLACEHOLDERS) == set(KINDS)
    assert len(set(PLACEHOLDERS.values())) == len(KINDS)
    assert find(" ".join(PLACEHOLDERS.values())) == []


def test_redaction_replaces_every_find_and_counts_by_kind() -> None:
    iban = "GB82 WEST 1234 5698 7654 32"
    text = f"Write jane@example.org or bob@example.org from 8.8.8.8,\ncall +44 20 7946 0958; pay {iban}."
    redacted, counts = redact(text)
    assert redacted == "Write <email> or <email> from <ip>,\ncall <phone>; pay <iban>."
    assert counts == {"email": 2, "ip": 1, "phone": 1, "iban": 1}


def test_text_without_personal_information_is_returned_as_it_is() -> None:
    text = "\n".join(prose(random.Random(0), 50))
    assert redact(text) == (text, {})


def test_redaction_uncovers_what_ran_into_another_find() -> None:
    """The phone number is grouped like no number while the card is beside it."""
    text = "4111 1111 1111 1111 212-555-1234"
    assert redact(text) == ("<card> <phone>", {"card": 1, "phone": 1})


PIECES = st.one_of(
    st.sampled_from([kind(random.Random(seed)) for seed in range(12) for kind in PLANTS.values()]),
    st.sampled_from(
        [
            "123-45-6789",
            "PESEL",
            "44051401359",
            "tel",
            "version",
            "1.2.3.4",
            "@",
            "x.org",
            "+",
            "(",
            "2001:",
            "::",
        ]
    ),
    st.text("0123456789", max_size=5),
)


@given(st.lists(st.tuples(PIECES, st.sampled_from(["", " ", "-", ".", ":", "/", "\n", ", "])), max_size=12))
def test_redacting_twice_is_redacting_once(pieces: list[tuple[str, str]]) -> None:
    text = "".join(piece + mark for piece, mark in pieces)
    redacted, counts = redact(text)
    assert redact(redacted) == (redacted, {})
    assert sum(counts.values()) >= len(find(text))


@given(st.lists(st.tuples(PIECES, st.sampled_from(["", " ", "-", ".", ":", "/", "\n", ", "])), max_size=12))
def test_finds_are_sorted_and_do_not_overlap(pieces: list[tuple[str, str]]) -> None:
    text = "".join(piece + mark for piece, mark in pieces)
    found = find(text)
    assert all(0 <= one.start < one.stop <= len(text) and one.kind in KINDS for one in found)
    assert all(before.stop <= after.start for before, after in pairwise(found))


def test_the_counts_of_a_redaction_are_those_of_what_was_planted() -> None:
    draw = random.Random(5)
    text, planted = plant(prose(draw, len(PLANTS) * EACH), draw, *PLANTS)
    redacted, counts = redact(text)
    assert counts == Counter(kind for kind, _ in planted)
    assert not [item for _, item in planted if item in redacted]
