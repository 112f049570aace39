from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.core.errors import ConfigError
from lmcache.core.urls import parse_size, parse_url, take_options


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("17B", 17),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("5MB", 5_000_000),
        ("5MiB", 5 << 20),
        ("100GB", 100 * 10**9),
        ("100GiB", 100 << 30),
        ("1.5GiB", 3 << 29),
        ("0.1GB", 100_000_000),
        ("2TB", 2 * 10**12),
        ("2tib", 2 << 40),
        ("1PB", 10**15),
        (" 10 GB ", 10**10),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1G", "1XB", "1e9", "1,5GB", "1GB2", "\u0661", "1.GB"]
)
def test_what_is_not_a_size(text):
    with pytest.raises(ConfigError, match=r"is not a size; write bytes.*GB is 1000\*\*3"):
        parse_size(text)


def test_the_parts_of_a_url():
    url = parse_url(
        "redis://me:p%40ss@Host:6379/a%20b/c?max_size=1MB&x=1+2", options=("max_size", "x")
    )
    assert (url.scheme, url.host, url.port, url.path) == ("redis", "host", 6379, "/a b/c")
    assert (url.username, url.password) == ("me", "p@ss")
    assert url.options == {"max_size": "1MB", "x": "1 2"}
    assert url.size("max_size") == 1_000_000


def test_absent_parts_are_empty():
    url = parse_url("memory://", options=("max_size",))
    assert (url.host, url.port, url.path, url.username, url.password) == ("", None, "", "", "")
    assert url.size("max_size") is None


def test_a_path_of_any_bytes():
    assert parse_url("file:///a%FF").path.encode(errors="surrogateescape") == b"/a\xff"


@pytest.mark.parametrize(
    "url", ["", "file", "/dir", "file:/dir", "file:dir", "redis://[x", "redis://h:port/"]
)
def test_what_is_not_a_url(url):
    with pytest.raises(ConfigError, match="malformed URL"):
        parse_url(url)


def test_a_nul_in_the_path_is_refused():
    with pytest.raises(ConfigError, match="malformed URL"):
        parse_url("file:///a%00b")


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(
        ConfigError, match="unknown option 'maxsize' in a 'file' URL; did you mean 'max_size'"
    ):
        parse_url("file:///d?maxsize=1", options=("min_free", "max_size"))
    with pytest.raises(ConfigError, match="unknown option 'zzz' in a 'file' URL; did you mean"):
        parse_url("file:///d?zzz=1", options=("min_free", "max_size"))
    with pytest.raises(ConfigError, match="it takes none"):
        parse_url("file:///d?zzz=1")


def test_an_option_given_twice_is_refused():
    with pytest.raises(ConfigError, match="option 'x' is given twice in a 'file' URL"):
        parse_url("file:///d?x=1&x=1", options=("x",))


@pytest.mark.parametrize(
    "url", ["file:///d?x", "file:///d?=1", "file:///d#x", "file:///d?x=1#y", "file:///d?X=1"]
)
def test_malformed_options_are_refused(url):
    with pytest.raises(ConfigError, match="malformed"):
        parse_url(url, options=("x", "X"))


def test_a_bad_size_names_its_option():
    with pytest.raises(ConfigError, match="option 'x': '1G' is not a size"):
        parse_url("file:///d?x=1G", options=("x",)).size("x")


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:hunter2@h/?unknown=1",
        "redis://me:hunter2@h/?x",
        "redis://me:hunter2@h:port/",
        "redis://me:hunter2@[h",
        "redis://me:hunter2@h/#f",
        "redis://me:hunter2@h/%00",
        "redis://me:?hunter2@h/",
        "redis://me:#hunter2@h/",
        "redis://me:x?hunter2=y@h/",
        "redis://me:x@hunter2@h/?y=1",
    ],
)
def test_no_message_repeats_a_password(url):
    with pytest.raises(ConfigError) as caught:
        parse_url(url)
    error: BaseException | None = caught.value
    while error:
        assert "hunter2" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_repr_hides_secrets():
    shown = repr(parse_url("redis://me:hunter2@h/?secret=hunter3", options=("secret",)))
    assert "hunter" not in shown
    assert "host='h'" in shown


def test_options_of_another_layer_are_taken_off():
    url = "file:///d?codec=z%6Cib&max_size=1%47B&priority=3"
    rest, taken = take_options(url, ("codec", "priority", "absent"))
    assert rest == "file:///d?max_size=1%47B"
    assert taken == {"codec": "zlib", "priority": "3"}
    assert take_options("file:///d?codec=zlib", ("codec",)) == ("file:///d", {"codec": "zlib"})
    assert take_options("file:///d", ("codec",)) == ("file:///d", {})


def test_another_layers_option_given_twice_is_refused():
    with pytest.raises(ConfigError, match="option 'codec' is given twice"):
        take_options("file:///d?codec=a&codec=b", ("codec",))


@given(st.text(max_size=40))
def test_anything_parses_or_is_a_config_error(text):
    for url in (text, f"file://{text}", f"redis://u:p@h/{text}?x=1"):
        try:
            parse_url(url, options=("x",))
        except ConfigError:
            pass
