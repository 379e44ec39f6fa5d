"""Who is admitted: tokens, certificates, both, tickets; and secrets that stay where they are."""

import hmac
import json
import os
import time
from pathlib import Path

import pytest

from snello.config import CertsConfig
from snello.errors import ConfigError
from snello.split.client.connection import Endpoint
from snello.split.client.endpoints import make_endpoint
from snello.split.security import auth
from snello.split.security.auth import Anyone, Both, Certificates, Tickets, Token, Tokens, hash_token
from snello.split.security.certs import make_certs
from snello.split.security.tls import ClientFiles, ServerFiles

SECRET, KEY = "a secret of ann", b"a key of sixteen bytes and more"
HASHES = {"ann": hash_token(SECRET), "bob": hash_token("another")}


@pytest.fixture
def compared(monkeypatch) -> list[tuple]:
    """What was compared in constant time."""
    calls = []
    real = hmac.compare_digest

    def compare(a, b) -> bool:
        calls.append((a, b))
        return real(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    return calls


def test_anyone():
    assert Anyone().credentials() == {} and Anyone().identify({}) == "anyone" == Anyone().identify({"name": "ann"})


class TestTokens:
    @pytest.fixture(params=["mapping", "file"])
    def tokens(self, request, tmp_path) -> Tokens:
        if request.param == "mapping":
            return Tokens(HASHES)
        (tmp_path / "tokens.json").write_text(json.dumps(HASHES))
        return Tokens(tmp_path / "tokens.json")

    def test_who_knows_the_secret(self, tokens):
        assert tokens.identify(Token("ann", SECRET).credentials()) == "ann"
        assert tokens.identify(Token("bob", "another").credentials(), "somebody else") == "bob"

    @pytest.mark.parametrize(
        "shown",
        [
            {},
            {"name": "ann"},
            {"token": SECRET},
            {"name": "ann", "token": ""},
            {"name": "ann", "token": "another"},
            {"name": "bob", "token": SECRET},
            {"name": "ann", "token": SECRET + " "},
            {"name": "ann", "token": SECRET.upper()},
            {"name": "ann ", "token": SECRET},
            {"name": "ann", "token": HASHES["ann"]},
            {"name": "nobody", "token": SECRET},
            {"name": "nobody", "token": ""},
            {"name": "", "token": ""},
            {"name": "ann\0", "token": SECRET},
            {"name": "ünn", "token": "ü"},
            pytest.param({"name": "ann", "token": "\ud800"}),
        ],
    )
    def test_who_does_not(self, tokens, shown):
        assert tokens.identify(shown) is None

    def test_an_empty_token_is_none(self):
        assert Tokens({"ann": hash_token("")}).identify({"name": "ann", "token": ""}) is None

    @pytest.mark.parametrize("name", ["ann", "nobody", ""])
    def test_takes_as_long_for_every_name(self, compared, name):
        tokens = Tokens(HASHES)
        tokens.identify({"name": name, "token": "guess"})
        ((shown, known),) = compared
        assert shown == hash_token("guess").encode() and len(known) == 64

    def test_keeps_hashes_only(self, tokens):
        assert SECRET not in repr(vars(tokens)) + repr(tokens)

    def test_the_file_is_read_anew(self, tmp_path):
        file = tmp_path / "tokens.json"
        file.write_text(json.dumps(HASHES))
        tokens = Tokens(file)
        file.write_text(json.dumps({"cyd": hash_token("third")}))
        assert tokens.identify({"name": "ann", "token": SECRET}) is None
        assert tokens.identify({"name": "cyd", "token": "third"}) == "cyd"

    @pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"ann": 3}', '{"ann": null}', '["ann"]', "\ud800"])
    def test_a_broken_file(self, tmp_path, content):
        file = tmp_path / "tokens.json"
        data = content.encode("utf-8", "surrogatepass")
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=r"tokens\.json"):
            Tokens(file)
        file.write_text(json.dumps(HASHES))
        tokens = Tokens(file)
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=r"tokens\.json"):
            tokens.identify({"name": "ann", "token": SECRET})

    def test_no_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read"):
            Tokens(tmp_path / "tokens.json")

    def test_a_hash_that_is_none(self):
        assert Tokens({"ann": "ü"}).identify({"name": "ann", "token": SECRET}) is None


class TestCertificates:
    @pytest.mark.parametrize("name", ["ann", "a", "Ann-1.b_c", "a" * 64])
    def test_names(self, name):
        assert Certificates().identify({}, name) == name

    @pytest.mark.parametrize("name", [None, "", "../ann", ".ann", "ann/b", "ann b", "ann\n", "a" * 65, "ünn", "-ann"])
    def test_what_is_none(self, name):
        assert Certificates().identify({"name": "ann", "token": SECRET}, name) is None


class TestBoth:
    both = Both(Certificates(), Tokens(HASHES))

    def test_the_same_name(self):
        assert self.both.identify({"name": "ann", "token": SECRET}, "ann") == "ann"

    @pytest.mark.parametrize(
        "shown, certificate",
        [
            ({"name": "ann", "token": SECRET}, None),
            ({"name": "ann", "token": SECRET}, "bob"),
            ({"name": "ann", "token": "guess"}, "ann"),
            ({}, "ann"),
            ({}, None),
        ],
    )
    def test_anything_else(self, shown, certificate):
        assert self.both.identify(shown, certificate) is None


class TestTickets:
    def test_until_it_expires(self, monkeypatch):
        tickets = Tickets(KEY)
        ticket = tickets.issue("ann", 60)
        assert tickets.identify(ticket) == "ann" == Tickets(KEY).identify(json.loads(json.dumps(ticket)))
        now = time.time()
        monkeypatch.setattr(auth.time, "time", lambda: now + 59)
        assert tickets.identify(ticket) == "ann"
        monkeypatch.setattr(auth.time, "time", lambda: now + 61)
        assert tickets.identify(ticket) is None
        monkeypatch.undo()
        assert tickets.identify(tickets.issue("ann", -1)) is None and tickets.identify(tickets.issue("ann", 0)) is None

    @pytest.mark.parametrize(
        "change",
        [
            {"name": "bob"},
            {"name": ""},
            {"expires": "99999999999"},
            {"expires": ""},
            {"expires": "soon"},
            {"expires": "1e99"},
            {"expires": "9" * 5000},
            {"expires": "nan"},
            {"expires": " 99999999999"},
            {"signature": ""},
            {"signature": "0" * 64},
            {"signature": "ü"},
            pytest.param({"signature": "\ud800"}),
        ],
    )
    def test_tampered_with(self, change):
        tickets = Tickets(KEY)
        assert tickets.identify({**tickets.issue("ann", 60), **change}) is None

    def test_of_another_key(self):
        assert Tickets(KEY).identify(Tickets(KEY + b"!").issue("ann", 60)) is None

    @pytest.mark.parametrize("expires", ["soon", "", "1e99", "9" * 5000])
    def test_signed_but_no_number(self, expires):
        tickets = Tickets(KEY)
        assert tickets.identify({"name": "ann", "expires": expires, "signature": tickets._sign("ann", expires)}) is None

    @pytest.mark.parametrize("shown", [{}, {"name": "ann"}, {"name": "ann", "token": SECRET}])
    def test_no_ticket(self, shown, compared):
        assert Tickets(KEY).identify(shown) is None and len(compared) == 1

    @pytest.mark.parametrize("key", [b"", b"a" * 15])
    def test_short_keys(self, key):
        with pytest.raises(ConfigError, match="at least 16 bytes") as caught:
            Tickets(key)
        assert not key or key.decode() not in str(caught.value)

    @pytest.mark.parametrize("name", ["", "a\nb", "a b", "../a", "a" * 65])
    def test_names(self, name):
        with pytest.raises(ConfigError, match="a name has letters"):
            Tickets(KEY).issue(name, 60)


class TestSecretsAreNotShown:
    def test_by_credentials(self):
        shown = [Token("ann", SECRET), Tickets(KEY), Tokens(HASHES), Both(Tokens(HASHES), Tickets(KEY))]
        text = "".join(f"{value!r} {value}" for value in shown)
        assert SECRET not in text and KEY.decode() not in text and HASHES["ann"] not in text

    def test_by_endpoints_and_files(self, tmp_path):
        make_certs(CertsConfig(tmp_path, clients=("ann",)))
        folder = tmp_path / "clients" / "ann"
        token, key = (folder / "token").read_text().strip(), (folder / "client.key").read_text()
        endpoint = make_endpoint("127.0.0.1:1", folder, None)
        assert isinstance(endpoint, Endpoint) and endpoint.credentials["token"] == token and endpoint.key
        files = ClientFiles.load(folder, None), ServerFiles.load(tmp_path)
        server_key = (tmp_path / "server" / "server.key").read_text()
        for value in (endpoint, *files):
            for text in (repr(value), str(value), f"{value}"):
                for secret in (token, hash_token(token), key.splitlines()[1], server_key.splitlines()[1], "PRIVATE"):
                    assert secret not in text
        assert os.stat(folder / "token").st_mode & 0o077 == 0
        assert Path(folder).name in repr(files[0])
