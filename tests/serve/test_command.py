"""`alignpro serve` as it is typed: it says where it listens, ends gently, refuses what is wrong."""

from __future__ import annotations

import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

from alignpro.cli import app
from alignpro.config.serve import ServeConfig
from alignpro.serve.server import listen
from native_runs import save_run
from serve.raw_upstream import STREAM_HEAD, RawUpstream, chunk


def started(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "alignpro", "serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    found = re.search(r"listening on (http://\S+)", line)
    if found is None:
        process.kill()
        raise AssertionError(line + process.stderr.read())
    return process, found[1]


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("serve") / "my-run", tiny_model_dir("llama"), 6)


def test_a_model_and_a_prompter_on_one_port(run, tiny_model_dir):
    model = str(tiny_model_dir("llama"))
    process, url = started("--model", model, "--run", str(run), "--rewrite", "on", "threads=1")
    with process:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        raw = client.chat.completions.with_raw_response.create(
            model=model, messages=[{"role": "user", "content": "the heron"}], max_tokens=4
        )
        assert raw.headers["x-alignpro-run"] == "my-run"
        assert raw.headers["x-alignpro-reason"] in ("rewritten", "deadline")
        assert raw.parse().choices[0].message.role == "assistant"
        process.send_signal(signal.SIGHUP)
        assert "my-run: reloaded" in process.stderr.readline()
        assert client.models.list().data[0].id == model
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, process.stderr.read()


def test_it_may_open_as_many_files_as_the_system_lets_it():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
    try:
        process, _ = started("--upstream", "http://127.0.0.1:9/v1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with process:
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        process.terminate()
    assert re.search(rf"Max open files +{hard} +{hard} ", limits)


def test_sigterm_lets_requests_end():
    go_on = threading.Event()

    def reply(got, send):
        send(STREAM_HEAD + chunk(b"data: one\n\n"))
        assert go_on.wait(30)
        send(chunk(b"data: two\n\n") + b"0\r\n\r\n")

    with RawUpstream(reply) as upstream:
        process, url = started("--upstream", upstream.url)
        with process:
            request = urllib.request.Request(f"{url}/chat/completions", b"{}", method="POST")
            with urllib.request.urlopen(request, timeout=30) as response:
                assert response.readline() == b"data: one\n"
                process.send_signal(signal.SIGTERM)
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.5)
                go_on.set()
                assert response.read() == b"\ndata: two\n\n"
            assert process.wait(30) == 0, process.stderr.read()


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_stream_that_does_not_end_is_ended_with_the_server(signals):
    def reply(got, send):
        send(STREAM_HEAD)
        while True:
            send(chunk(b"data: x\n\n"))
            time.sleep(0.02)

    seconds = 0.5 if len(signals) == 1 else 60  # a second SIGINT does not wait
    with RawUpstream(reply) as upstream:
        process, url = started(f"shutdown_seconds={seconds}", "--upstream", upstream.url)
        with process:
            request = urllib.request.Request(f"{url}/chat/completions", b"{}", method="POST")
            with urllib.request.urlopen(request, timeout=30) as response:
                assert response.readline() == b"data: x\n"
                for number in signals:
                    process.send_signal(number)
                    time.sleep(0.2)
                assert process.wait(30) == 0
            assert upstream.left.wait(20)
            said = process.stderr.read()
    assert "the server ended first" in said and "Traceback" not in said and "rror:" not in said


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"upstream": "example.com"}, "upstream: expected an http://"),
        ({"upstream": "http://a", "model": "m"}, "model: expected null with upstream"),
        ({"upstream": "http://a", "rewrite": True}, "rewrite: expected false without run"),
        ({"upstream": "http://a", "run": "r", "rewrite": "on"}, "rewrite: expected"),
        ({"upstream": "http://a", "port": 70000}, "port: expected between 0 and 65535"),
    ],
)
def test_a_configuration_is_checked(fields, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        ServeConfig(**fields)


def test_what_is_wrong_is_one_line(tmp_path):
    with RawUpstream(lambda got, send: None) as taken:
        for arguments, part in (
            (["--upstream", "http://a", "--port", str(taken.port)], "in use"),
            (["--upstream", "http://a", "--run", str(tmp_path)], "the directory of a run"),
            ([], "upstream: expected an address, or a model in this process"),
        ):
            done = CliRunner().invoke(app, ["serve", *arguments])
            assert done.exit_code == 2 and part in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "says"),
    [("127.0.0.1", "Address already in use; port names another"), ("256.1.1.1", "host and port")],
)
def test_an_address_that_cannot_be_had_is_named(host, says):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"^{host}, port {port}: .*{says}") as caught:
            listen(ServeConfig(upstream="http://127.0.0.1:1/v1", host=host, port=port))
    assert "attempting" not in str(caught.value)
