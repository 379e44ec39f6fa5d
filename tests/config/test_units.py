"""Amounts of bytes, network links and addresses, as text."""

import pytest

from snello.config import DoctorConfig, JoinConfig, ServeConfig
from snello.config.units import Link, parse_address, parse_bytes
from snello.errors import ConfigError

MBIT = Link(1e6, 0.02)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("500MB", 500_000_000),
        ("2GiB", 2 * 2**30),
        ("1.5kb", 1500),
        ("7b", 7),
        ("1tb", 10**12),
        ("3gb", 3 * 10**9),
        ("1KiB", 1024),
        ("1.5MiB", 3 * 2**19),
        ("1TiB", 2**40),
        ("0.25GiB", 2**28),
        (" 500 MB ", 500_000_000),
        ("500\tmb", 500_000_000),
        ("500Mb", 500_000_000),
        ("2gIB", 2 * 2**30),
        ("007kb", 7000),
    ],
)
def test_bytes(text, expected):
    amount = parse_bytes(text, "--split.max-bytes")
    assert amount == expected and type(amount) is int


@pytest.mark.parametrize("text, expected", [("1.001kb", 1001), ("1.005MB", 1_005_000), ("2.007GB", 2_007_000_000)])
def test_no_byte_is_lost_to_binary_fractions(text, expected):
    assert parse_bytes(text, "x") == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "500",
        "MB",
        "500 M",
        "500MBit",
        "500PB",
        "-5MB",
        "+5MB",
        "5e6b",
        ".5MB",
        "5.MB",
        "5,5MB",
        "0MB",
        "0.0GB",
        "5MB 5MB",
        "1 0MB",
        "5 M B",
        "nan",
        "infb",
        "0x10b",
        "1_000b",
    ],
)
def test_other_texts_are_no_bytes_and_the_flag_is_named(text):
    with pytest.raises(ConfigError, match=r"^--split\.max-bytes must be an amount as 500MB or 2GiB, got ") as error:
        parse_bytes(text, "--split.max-bytes")
    assert str(error.value).endswith(f"got {text!r}")


@pytest.mark.parametrize("text", ["0.4b", "0.0001kb", "9" * 400 + "b"], ids=lambda text: text[:8])
def test_less_than_a_byte_and_more_than_a_number_are_no_bytes(text):
    with pytest.raises(ConfigError, match=r"^--split\.max-bytes must be"):
        parse_bytes(text, "--split.max-bytes")


@pytest.mark.parametrize(
    "text, rate, round_trip",
    [
        ("10mbit/20ms", 10e6, 0.02),
        ("10mbit", 10e6, 0.0),
        ("250kbit/1.5s", 250e3, 1.5),
        ("1gbit/50us", 1e9, 50e-6),
        ("0.5gbit/0.1ms", 0.5e9, 1e-4),
        (" 10 MBit / 20 MS ", 10e6, 0.02),
    ],
)
def test_links(text, rate, round_trip):
    link = Link.parse(text, "--split.link")
    assert link.bits_per_second == pytest.approx(rate) and link.round_trip_s == pytest.approx(round_trip)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "/20ms",
        "10",
        "10/20",
        "10mb/20ms",
        "10mbit/20",
        "10mbit/20min",
        "20ms/10mbit",
        "0mbit/20ms",
        "0mbit",
        "10mbit/-20ms",
        "-10mbit",
        "10mbit/20ms/30ms",
        "10mbit//20ms",
        "10mbit 20ms",
        "10bit",
        "fast",
        "10mbit/slow",
    ],
)
def test_other_texts_are_no_links_and_the_flag_is_named(text):
    with pytest.raises(ConfigError, match=r"^--split\.link must be a link as 10mbit/20ms .*, got "):
        Link.parse(text, "--split.link")


@pytest.mark.parametrize(
    "num_bytes, round_trips, expected",
    [(0, 0, 0.0), (125_000, 0, 1.0), (0, 1, 0.02), (0, 7, 0.14), (1, 0, 8e-6), (10**9, 100, 8002.0)],
)
def test_seconds_are_bits_over_rate_and_round_trips(num_bytes, round_trips, expected):
    assert MBIT.seconds(num_bytes, round_trips) == pytest.approx(expected, rel=1e-12)


def test_seconds_of_a_parsed_link():
    assert Link.parse("8kbit/500ms", "x").seconds(3000, 4) == pytest.approx(3 + 2)
    assert Link.parse("8kbit", "x").seconds(3000, 4) == pytest.approx(3)


# Addresses


@pytest.mark.parametrize(
    "text, host, port",
    [
        ("server.example:7443", "server.example", 7443),
        ("localhost:1", "localhost", 1),
        ("127.0.0.1:65535", "127.0.0.1", 65535),
        ("[::1]:7443", "::1", 7443),
        ("[2001:db8::1]:07443", "2001:db8::1", 7443),
        ("[fe80::1%eth0]:7443", "fe80::1%eth0", 7443),
        ("bücher.example:7443", "bücher.example", 7443),
        ("my_server-2:7443", "my_server-2", 7443),
    ],
)
def test_addresses(text, host, port):
    assert parse_address(text, "ADDRESS") == (host, port) == parse_address(text, "--listen", any_port=True)


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", ":7443", "7443", "server", "server:", "server:x", "server:-1", "server:+1", "server:1.0"),
        *("server:65536", "server:99999999", "server:" + "9" * 5000, "server:\u00b2", "server:\u0661", "server:1 "),
        *("[::1:7443", "::1]:7443", "::1:7443", "[::1]7443", "[[::1]]:7443", "[]:7443", "[ ]:7443", "[::1]x:7443"),
        *("[127.0.0.1]:7443", "[server]:7443", "[::g]:7443", "ser]ver:7443", "a:b:7443", "2001:db8::1:7443"),
        *(" server:7443", "ser ver:7443", "server\n:7443", "https://server:7443", "unix:/tmp/x:1", "[unix:/tmp/x]:1"),
        *("user@server:7443", "dns:///server:1", "server/x:1", "server?:1", "*:7443"),
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_other_texts_are_no_addresses_and_the_flag_is_named(text):
    for any_port in (False, True):
        with pytest.raises(ConfigError, match=r"^--listen must be host:port, as server\.example:7443 or \[::1\]:7443"):
            parse_address(text, "--listen", any_port=any_port)


def test_port_0_is_for_listening_only():
    assert parse_address("0.0.0.0:0", "--listen", any_port=True) == ("0.0.0.0", 0)
    with pytest.raises(ConfigError, match=r"^ADDRESS must be .* with a port in 1\.\.65535, got '\[::1\]:0'"):
        parse_address("[::1]:0", "ADDRESS")
    for config in (JoinConfig, DoctorConfig):
        with pytest.raises(ConfigError, match=r"^ADDRESS must be"):
            config("server:0")
    assert ServeConfig(listen="127.0.0.1:0").listen == "127.0.0.1:0"
