"""What a server tells: metrics that Prometheus reads, a log that nobody can forge, the board, and its health."""

import io
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from snello.errors import CheckpointError, ConfigError
from snello.split.server.telemetry import Board, Telemetry, close_logger, health_reply, make_logger, printable

EVIL = "x\n12:00:00 info admitted peer=root\r\x1b[2J\u2028\u202e\x9b\udc80[red]"


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    made = Telemetry(logging.getLogger("test"))
    yield made
    made.close()


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Values by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        text = response.read().decode()
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# ---------------------------------------------------------------------------------------------------------- metrics


def test_prometheus_reads_what_happened(telemetry):
    port = telemetry.serve(0)
    before = scrape(port)
    assert before["snello_sessions", "train"] == before["snello_sessions", "inference"] == 0
    assert before["snello_steps_total",] == before["snello_queue_depth",] == before["snello_reconnects_total",] == 0
    for mode in ("train", "train", "inference"):
        telemetry.sessions.labels(mode).inc()
    telemetry.sessions.labels("train").dec()
    for seconds in (0.0004, 0.02, 59.0, 100.0):
        telemetry.step(seconds)
    telemetry.sent("uplink", {"activations": 100, "headers": 7})
    telemetry.sent("uplink", {"activations": 20})
    telemetry.sent("downlink", {"gradients": 5})
    telemetry.refused.labels("UNAUTHENTICATED").inc()
    telemetry.queue.inc(3)
    telemetry.queue.dec()
    telemetry.reconnects.inc()
    values = scrape(port)
    assert values["snello_sessions", "train"] == 1 and values["snello_sessions", "inference"] == 1
    assert values["snello_steps_total",] == values["snello_step_seconds_count",] == 4
    buckets = [values["snello_step_seconds_bucket", edge] for edge in ("0.001", "0.025", "30.0", "60.0", "+Inf")]
    assert buckets == [1, 2, 2, 3, 4]
    assert values["snello_bytes_total", "uplink", "activations"] == 120
    assert values["snello_bytes_total", "uplink", "headers"] == 7
    assert values["snello_bytes_total", "downlink", "gradients"] == 5
    assert values["snello_refused_total", "UNAUTHENTICATED"] == 1
    assert values["snello_queue_depth",] == 2 and values["snello_reconnects_total",] == 1


def test_two_servers_in_one_process_count_apart(telemetry):
    other = Telemetry(logging.getLogger("test"))
    other.step(1.0)
    assert scrape(telemetry.serve(0))["snello_steps_total",] == 0


def test_metrics_are_for_this_machine_only(telemetry):
    port = telemetry.serve(0)
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=1):
        pass


def test_a_port_that_is_taken_is_told_in_one_line(telemetry):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^--metrics-port {port} .*in use$"):
            telemetry.serve(port)


def test_after_close_nothing_is_served_and_no_thread_left():
    threads = threading.active_count()
    telemetry = Telemetry(logging.getLogger("test"))
    port = telemetry.serve(0)
    scrape(port)
    telemetry.close()
    telemetry.close()
    assert threading.active_count() == threads
    with pytest.raises(urllib.error.URLError):
        scrape(port)
    assert telemetry.serve(port) == port  # free again
    telemetry.close()


@pytest.mark.slow
def test_a_process_ends_without_closing():
    code = """
import logging
from snello.split.server.telemetry import Telemetry
print(Telemetry(logging.getLogger("test")).serve(0) > 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


# -------------------------------------------------------------------------------------------------------------- log


def logged(folder: Path | None, format: str, message: str, *args, severity=logging.INFO, **fields) -> str:
    """What the console shows of one record."""
    file = io.StringIO()
    log = make_logger(folder, format, Console(file=file, width=40))
    log.log(severity, message, *args, extra={"fields": fields})
    close_logger(log)
    return file.getvalue()


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "serve.log").read_bytes().splitlines()]


def test_text_lines(tmp_path):
    text = logged(tmp_path, "text", "session opened", session="ab12", peer="ipv4:1.2.3.4:5", loss=1.23456, note="two w")
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d info session opened session=ab12 peer=ipv4:1\.2\.3\.4:5 loss=1\.235 note=\"two w\"\n", text
    )
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning plain\n", logged(None, "text", "plain", severity=logging.WARNING))


def test_json_lines_with_types_and_time(tmp_path):
    fields = {
        "session": "ab12",
        "step": 3,
        "ok": True,
        "loss": 0.5,
        "none": None,
        "path": Path("a"),
        "nan": float("nan"),
    }
    shown = logged(tmp_path, "json", "done %d", 7, **fields)
    (line,) = lines_of(tmp_path)
    assert json.loads(shown) == line and shown.count("\n") == 1
    time = line.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    age = datetime.now(timezone.utc) - datetime.fromisoformat(time.replace("Z", "+00:00"))
    assert timedelta(0) <= age < timedelta(minutes=1)
    assert line == {"level": "info", "message": "done 7"} | fields | {"path": "a", "nan": "nan"}


@pytest.mark.parametrize("format", ["text", "json"])
def test_peers_cannot_forge_lines(tmp_path, format):
    shown = logged(tmp_path, format, "refused %s", EVIL, peer=EVIL, other='a" b=c')
    for line in (shown.removesuffix("\n"), (tmp_path / "serve.log").read_text().removesuffix("\n")):
        assert line.isprintable() and len(line.splitlines()) == 1
    if format == "text":
        assert 'other="a\\" b=c"' in shown and "[red]" in shown
    (line,) = lines_of(tmp_path)
    assert line["peer"] == EVIL and line["message"] == f"refused {EVIL}"


def test_fields_cannot_stand_for_the_line_itself(tmp_path):
    logged(tmp_path, "text", "message", severity=logging.ERROR, **{"time": "never", "level": "debug"})
    (line,) = lines_of(tmp_path)
    assert line["level"] == "error" and line["time"].startswith("2") and line["field_time"] == "never"


def test_long_fields_are_cut(tmp_path):
    text = logged(tmp_path, "text", "refused", peer="x" * 10_000)
    assert len(text) < 600 and text.endswith("x...\n")
    assert len((tmp_path / "serve.log").read_bytes()) < 700


def test_errors_are_told_with_their_traceback_in_the_file(tmp_path):
    file = io.StringIO()
    log = make_logger(tmp_path, "text", Console(file=file))
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("failed")
    close_logger(log)
    assert file.getvalue().endswith('error failed error="ValueError: two\\nlines"\n')
    assert "in test_errors_are_told" in lines_of(tmp_path)[0]["traceback"]


def test_the_logger_is_its_own(tmp_path, capsys):
    root, seen = logging.getLogger(), []
    handler = logging.Handler()
    handler.emit = seen.append
    root.addHandler(handler)
    try:
        one = make_logger(tmp_path, "text", Console(file=io.StringIO()))
        two = make_logger(tmp_path, "text", Console(file=io.StringIO()))  # made again: no line twice
        two.info("once")
        two.debug("never")
    finally:
        root.removeHandler(handler)
    assert one is two and one.name == "snello.serve" and not seen
    assert [line["message"] for line in lines_of(tmp_path)] == ["once"]
    close_logger(two)
    assert not two.handlers
    assert capsys.readouterr() == ("", "")


def test_a_log_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"could not write .*serve\.log"):
        make_logger(tmp_path / "none", "text", Console(file=io.StringIO()))
    assert not logging.getLogger("snello.serve").handlers


def test_printable_leaves_words_of_all_languages():
    assert printable("Grüße, 你好 [b]") == "Grüße, 你好 [b]"
    assert printable("a\nb\x7f\u202e") == "a\\nb\\x7f\\u202e"


# ------------------------------------------------------------------------------------------------------------ board

ROW = {"step": 3, "total": 10, "loss": 1.25, "rate": 99.6, "uplink_bytes": 12_340_000, "downlink_bytes": 5_000_000}


def terminal(monkeypatch) -> Console:
    monkeypatch.setenv("TERM", "xterm")
    return Console(file=io.StringIO(), force_terminal=True, width=140)


def plain(console: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


def test_the_board_has_a_row_for_each_session(monkeypatch):
    console = terminal(monkeypatch)
    with Board(console) as board:
        board.show("[red]anna\x1b[2J", **ROW, times_fewer=18.84)
        board.show("ben", **ROW | {"step": 7}, times_fewer=None)
        board.show("gone", **ROW, times_fewer=1.0)
        board.show("ben", **ROW | {"step": 8}, times_fewer=None)
        board.remove("gone")
        board.remove("never there")
    text = plain(console)
    last = text[text.rindex("[red]anna") :]
    assert last.startswith("[red]anna\\x1b[2J ") and "ben" in last and "gone" not in last
    row = last.splitlines()[0]
    for part in ("3/10", "loss 1.2500", "100 pictures/s", "12.3 MB up 5.0 down", "18.8x less"):
        assert part in row
    assert "8/10" in last.splitlines()[1] and "less" not in last.splitlines()[1]


def test_lines_of_the_log_stay_whole_above_the_board(monkeypatch):
    console = terminal(monkeypatch)
    log = make_logger(None, "text", console)
    with Board(console) as board:
        board.show("anna", **ROW, times_fewer=2.0)
        log.info("session opened", extra={"fields": {"note": "y" * 300}})
    close_logger(log)
    assert re.search(r"\d info session opened note=y{300}\n", plain(console).replace("\r", ""))


def test_no_terminal_shows_no_board():
    console = Console(file=io.StringIO())
    with Board(console) as board:
        board.show("anna", **ROW, times_fewer=2.0)
        board.remove("anna")
    assert console.file.getvalue() == ""


def test_the_board_is_shown_from_many_threads(monkeypatch):
    console = terminal(monkeypatch)
    with Board(console) as board:

        def work(i: int) -> None:
            for step in range(50):
                board.show(f"s{(i + step) % 5}", **ROW | {"step": step}, times_fewer=2.0)
                if step % 3 == 0:
                    board.remove(f"s{(i * 2 + step) % 5}")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(5):
            board.remove(f"s{i}")
        assert not board._progress.tasks


def test_health_is_what_the_protocol_says():
    """Field 1 as a varint: tag 1 << 3 | 0, then the enum's number."""
    assert [health_reply(True), health_reply(False)] == [bytes([1 << 3, 1]), bytes([1 << 3, 2])]
