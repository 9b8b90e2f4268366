"""Which names ``ring-mlx serve`` answers to, which web pages may ask it, and with which keys."""

from __future__ import annotations

import json
import socket

import pytest

from ring_mlx import demo_model_path
from ring_mlx.cli import build_parser
from ring_mlx.cli.serve_command import make_server
from ring_mlx.errors import OptionError
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.hosts import Hosts
from ring_mlx.serve.server import Server
from tests.serving import CHAT, GOOD, send

OURS = [
    *("localhost", "LOCALHOST", "localhost.", "localhost:1", "127.0.0.1", "127.0.0.1:8080", "127.8.9.1", "[::1]"),
    *("[::1]:8080", "[0:0:0:0:0:0:0:1]:80", "[::ffff:127.0.0.1]", "localhost:"),
]
FOREIGN = [
    *("evil.example.com", "evil.example.com:8080", "localhost.evil.com", "evil-localhost", "localhost.localdomain"),
    *("127.0.0.1.evil.com", "127.0.0.1@evil.com", "evil.com#localhost", "evil.com/localhost", "localhost..", "", " "),
    *("10.0.0.1", "0.0.0.0", "[::]", "[fe80::1]", "::1", "[::1", "127.1", "2130706433", "0x7f.1", "0177.0.0.1"),
    *("localhost:99999", "localhost:80x", "localhost:-1", "localhost:80:80", "localhost,evil.com", "*", "null"),
    *("xn--lcalhost-j7a", "\u017focalhost", "localhost evil.com", "[localhost]", "[::ffff:10.0.0.1]"),
]


@pytest.mark.parametrize("bound", ["127.0.0.1", "localhost", "::1"])
def test_loopback_names_and_no_others(bound):
    hosts = Hosts(bound)
    assert [name for name in OURS if not hosts.allows(name)] == []
    assert [name for name in FOREIGN if hosts.allows(name)] == []


def test_bound_addresses_and_allowed_names():
    hosts = Hosts("192.168.1.5", ["Box.local", "models.example.com."])
    for name in ("192.168.1.5:80", "box.LOCAL", "models.example.com:443", "localhost"):
        assert hosts.allows(name), name
    for name in ("192.168.1.6", "sub.box.local", "example.com", "local", "box"):
        assert not hosts.allows(name), name
    assert Hosts("box.local").allows("box.local:8080")
    for wildcard in ("0.0.0.0", "::", ""):
        everywhere = Hosts(wildcard)
        for name in ("10.1.2.3:80", "[fe80::1%25en0]:80", "[2001:db8::1]", "0.0.0.0:8080", "localhost"):
            assert everywhere.allows(name), name
        assert not everywhere.allows("box.local")
        assert not everywhere.allows("10.1.2.3.evil.com")
    assert Hosts("127.0.0.1", ["*"]).allows("evil.example.com")
    assert Hosts("fe80::1%eth0").allows("[fe80::1]:8080")
    assert all(Hosts("127.0.0.1", [name]).allows("[2001:db8::5]") for name in ("2001:db8::5", "[2001:DB8::5]"))


@pytest.mark.parametrize(
    "name", ["box.local:80", "https://box.local", "*.local", "box.local/", "a b", "b\u00fccher.de", "[::1]:80", ""]
)
def test_an_allowed_name_that_never_matches_is_refused(name):
    with pytest.raises(OptionError, match="is not a plain name"):
        Hosts("127.0.0.1", ["ok.local", name])


def test_origins():
    hosts = Hosts("127.0.0.1", ["ui.example.com"])
    for origin in ("http://localhost:3000", "http://127.0.0.1", "https://[::1]:8", "https://ui.example.com"):
        assert hosts.allows_origin(origin), origin
    for origin in ("null", "", "http://evil.com", "http://localhost.evil.com", "http://localhost@evil.com", "localhost",
                   "http://evil.com/http://localhost", "file://", "http://localhost http://evil.com"):  # fmt: skip
        assert not hosts.allows_origin(origin), origin
    assert Hosts("127.0.0.1", ["*"]).allows_origin("null")


@pytest.mark.parametrize(
    "origin", ["ui.example.com", "https://ui.example.com/", "https://", "", "https://a b@c", "Null"]
)
def test_an_allowed_origin_that_never_matches_is_refused(origin):
    with pytest.raises(OptionError, match="give one as browsers do"):
        Hosts("127.0.0.1", origins=["https://ok.example.com", origin])


UI = "https://UI.example.com:8443"


@pytest.fixture(scope="module")
def keyed():
    """A server with a key; it need not have loaded its model."""
    settings = Settings(demo_model_path(), "toy", store=False, read_ahead=False)
    server = Server(settings, port=0, api_key=" schlüssel\n", allowed_hosts=["box.local"], allowed_origins=[UI])
    server.start()
    server.engine.wait_until_loaded(60)
    yield server
    assert server.close()


KEY = {"Authorization": "Bearer schlüssel".encode().decode("latin-1")}


def code(answer):
    return answer[0], answer[2]["error"]["code"] if "error" in answer[2] else None


def test_foreign_hosts_and_pages_are_refused_on_every_route_and_with_a_key(keyed):
    for method, path, body in (
        ("GET", "/health", b""),
        ("GET", "/v1/models", b""),
        ("POST", CHAT, GOOD),
        ("GET", "/x", b""),
    ):
        assert code(send(keyed, method, path, body, Host="evil.example.com", **KEY)) == (403, "host_not_allowed")
        for page in ({"Origin": "http://evil.com"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
            assert code(send(keyed, method, path, body, **page, **KEY)) == (403, "origin_not_allowed")
    for own in (
        {"Host": "box.local:1"},
        {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
    ):
        assert send(keyed, "POST", CHAT, GOOD, **own, **KEY)[0] == 200
    assert "Access-Control-Allow-Origin" not in send(keyed, "GET", "/health", Origin="http://localhost:3000")[1]


def test_an_allowed_page_may_ask_and_read(keyed):
    page = {"Origin": UI.lower(), "Sec-Fetch-Site": "cross-site"}
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    status, headers, _ = send(keyed, "OPTIONS", CHAT, **page, **ask)
    assert status == 200
    assert headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
    assert "POST" in headers["Access-Control-Allow-Methods"]
    for answer in (
        send(keyed, "POST", CHAT, GOOD, **page, **KEY),
        send(keyed, "POST", CHAT, GOOD, **page),
        send(keyed, "GET", "/health", **page),
        (status, headers),
    ):
        assert answer[1]["Access-Control-Allow-Origin"] == UI.lower()
        assert answer[1]["Vary"] == "Origin"
    assert send(keyed, "POST", CHAT, GOOD, **page)[0] == 401, "the key is still asked for"
    assert send(keyed, "POST", CHAT, GOOD, **page, Host="evil.com", **KEY)[0] == 403
    for other in ("http://localhost:3000", "https://ui.example.com", f"{UI.lower()}.evil.com", "null", ""):
        status, headers, _ = send(keyed, "OPTIONS", CHAT, Origin=other, **ask)
        assert status in (401, 403), other
        assert not [name for name in headers if name.startswith("Access-Control")], other


def test_any_page_where_that_is_asked_for():
    hosts = Hosts("127.0.0.1", origins=["*"])
    assert all(hosts.grants(page) and hosts.allows_origin(page) for page in ("null", "https://evil.com"))
    assert not hosts.grants(None)
    assert not hosts.allows("evil.com")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET http://localhost/health HTTP/1.1\r\nHost: localhost", 200),
        ("GET HTTP://BOX.local:80/health HTTP/1.1\r\nHost: localhost", 200),
        ("GET http://evil.com/health HTTP/1.1\r\nHost: localhost", 403),
        ("GET http://localhost/health HTTP/1.1\r\nHost: evil.com", 403),
        ("GET http://localhost@evil.com/health HTTP/1.1\r\nHost: localhost", 403),
        ("GET http:///health HTTP/1.1\r\nHost: localhost", 403),
        ("GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.com", 400),
        ("GET /health HTTP/1.1\r\nHost:", 403),
        ("GET /health HTTP/1.1", 400),
        ("GET /health HTTP/1.0", 200),
        ("GET /health HTTP/1.0\r\nHost: evil.com", 403),
    ],
)
def test_targets_and_hosts(keyed, head, status):
    with socket.create_connection(("127.0.0.1", keyed.server_port), timeout=20) as s:
        s.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: s.recv(1 << 16), b""))
    assert int(answer[9:12]) == status
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])) == ({"error"} if status >= 400 else {"status", "model"})


KEYS = {
    "Bearer schlüssel": 200,
    "bearer schlüssel": 200,
    "BEARER   schlüssel": 200,
    "Bearer schlüsse": 401,
    "Bearer schlüssel2": 401,
    "Bearer s": 401,
    "Bearer schlüssel x": 401,
    "Bearer": 401,
    "Bearer ": 401,
    "schlüssel": 401,
    "Basic schlüssel": 401,
    "Bearerx schlüssel": 401,
    "Token schlüssel": 401,
    "Bearer Schlüssel": 401,
    "": 401,
}


@pytest.mark.parametrize("given", KEYS)
def test_only_the_whole_key_after_bearer(keyed, given):
    found = send(keyed, "GET", "/v1/models", Authorization=given.encode().decode("latin-1"))
    assert found[0] == KEYS[given]
    assert found[1].get("WWW-Authenticate") == (None if KEYS[given] == 200 else "Bearer")


@pytest.mark.parametrize(
    ("given", "status"), [("schlüssel", 200), ("schlüsse", 401), ("Bearer schlüssel", 401), ("", 401)]
)
def test_the_key_in_its_own_header(keyed, given, status):
    assert send(keyed, "GET", "/v1/models", **{"X-Api-Key": given.encode().decode("latin-1")})[0] == status


@pytest.mark.parametrize("key", ["voil\u00e0", "\u00c5", "a b", "\udcff\udc85"])
def test_keys_of_any_bytes(key):
    """Those of UTF-8 look like spaces of Latin-1 in part, and one from the environment may be none of it."""
    settings = Settings(demo_model_path(), "toy", store=False, read_ahead=False)
    server = Server(settings, port=0, api_key=key)
    server.start()
    sent = key.encode("utf-8", "surrogateescape").decode("latin-1")
    for given, status in ((f"Bearer {sent}", 200), (f"Bearer  {sent} ", 200), (f"Bearer {sent[:-1]}", 401)):
        assert send(server, "GET", "/v1/models", Authorization=given)[0] == status
    assert send(server, "GET", "/v1/models", **{"X-Api-Key": sent})[0] == 200
    assert server.close()


@pytest.mark.parametrize("key", ["", " ", "a\nb", "a\x7f", "\0"])
def test_keys_that_no_client_can_send_are_refused(key):
    with pytest.raises(OptionError, match="the API key"):
        Server(Settings(demo_model_path(), "toy", store=False), port=0, api_key=key)


def test_the_option():
    args = build_parser().parse_args(["serve", "--port", "0", "--no-store", "--allowed-hosts", "a.example, B.local,"])
    server = make_server(args, None)
    server.start()
    for host, status in (("a.example", 200), ("b.local:8", 200), ("c.local", 403)):
        assert send(server, "GET", "/v1/models", Host=host)[0] == status
    assert server.close()
