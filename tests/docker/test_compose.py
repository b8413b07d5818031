"""The files that images and services are made from: pinned, closed to the outside, without a secret in them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.environment import SILENT
from pipeline.assets import find_asset
from pipeline.config import Config
from stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
SERVICES = ("database", "server", "deploy", "worker", "worker-gpu")


def read_compose() -> dict[str, Any]:
    """The file as Compose reads it, the environment's values put in."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        return os.environ.get(name, rest if kind == ":-" else f"<{name}>")

    text = re.sub(r"(?<!\$)\$\{(\w+)(:[-?])([^}]*)\}", value, COMPOSE.read_text())
    return dict(yaml.safe_load(text))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return read_compose()


def test_services_are_these(compose: dict[str, Any]) -> None:
    assert tuple(compose["services"]) == SERVICES


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_closed(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and not service.get("privileged")
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["user"].partition(":")[0] not in ("", "0", "root")
    for published in service.get("ports", ()):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", published), "only this machine may reach it"
    if "ports" not in service:
        assert [compose["networks"][network]["internal"] for network in service["networks"]] == [True]
    limits = service["deploy"]["resources"]["limits"]
    assert float(limits["cpus"]) > 0 and re.fullmatch(r"\d+[MG]", limits["memory"])


@pytest.mark.parametrize("name", SERVICES)
def test_image_is_pinned(compose: dict[str, Any], name: str) -> None:
    image = compose["services"][name]["image"]
    assert image in ("headcast:cpu", "headcast:cuda") or re.search(r":\d+\.\d+\S*$", image), image


@pytest.mark.parametrize("name", SERVICES)
def test_no_secret_in_plain_sight(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    for variable, value in service.get("environment", {}).items():
        if re.search(r"PASSWORD|SECRET|TOKEN|AUTH|CONNECTION_URL", variable):
            assert value.startswith("/run/secrets/"), f"{variable} shows its value to `docker inspect`"
    for secret in service.get("secrets", ()):
        assert set(compose["secrets"][secret]) == {"file"}
    git_ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert all(f"/docker/{Path(s['file']).parent}/" in git_ignored for s in compose["secrets"].values())


@pytest.mark.parametrize("name", SERVICES)
def test_service_waits_for_what_it_needs(compose: dict[str, Any], name: str) -> None:
    """And its health is told: its own check, or the address that the image's check asks."""
    services = compose["services"]
    for other, how in services[name].get("depends_on", {}).items():
        ends = services[other]["healthcheck"] == {"disable": True} if "healthcheck" in services[other] else False
        assert how["condition"] == ("service_completed_successfully" if ends else "service_healthy")
    own = services[name].get("healthcheck", {})
    assert "test" in own or own.get("disable") or services[name]["environment"]["HEADCAST_HEALTH_URL"]


def test_workers_stop_gently_and_keep_the_dataset(compose: dict[str, Any]) -> None:
    for name in ("worker", "worker-gpu"):
        service = compose["services"][name]
        assert service["stop_grace_period"] == "2m"
        assert {volume.rpartition(":")[2] for volume in service["volumes"]} == {"/srv", "/var/cache/headcast"}
        assert "--with-healthcheck" in service["command"]
    assert "${HEADCAST_DATA:?" in COMPOSE.read_text(), "without a folder for the dataset nothing starts"


def instructions(stage: str) -> list[tuple[str, str]]:
    """Keyword and text of every instruction of a stage of the Dockerfile, `` being the last."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    stages: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in filter(str.strip, joined.splitlines()):
        keyword, _, text = line.partition(" ")
        if keyword == "FROM":
            current = stages.setdefault(text.partition(" AS ")[2], [])
        current.append((keyword, " ".join(text.split())))
    return stages[stage]


def test_final_stage_only_copies_what_is_built() -> None:
    final = instructions("")
    assert [keyword for keyword, _ in final].count("RUN") == 0
    assert ("USER", "10001:10001") in final and ("ENTRYPOINT", '["tini", "--", "headcast"]') in final
    assert any(keyword == "HEALTHCHECK" for keyword, _ in final)
    assert final[0] == ("FROM", "runtime")
    installed = next(text for keyword, text in instructions("runtime") if keyword == "RUN")
    assert not re.search(r"\b(gcc|g\+\+|make|git|build-essential|python3-pip|python3-dev)\b", installed)


def test_base_is_pinned_and_no_index_is_named() -> None:
    base = re.search(r"^ARG BASE=(\S+)", DOCKERFILE, re.MULTILINE)
    assert base and re.search(r":\w+-\d{8}-slim$", base[1]), "a dated tag, which is never made anew"
    assert not re.search(r"https?://|index-url|find-links", DOCKERFILE)
    site = [text for _, text in instructions("builder") if "bootstrap.py --" in text or "compile_gsplat.py;" in text]
    assert len(site) == 2 and all("--mount=type=secret,id=pip" in text for text in site)


def test_image_has_the_models_of_a_run_and_they_are_free() -> None:
    fetched = re.search(r"assets fetch\s+([\w ]+);", " ".join(text for _, text in instructions("builder")))
    assert fetched
    names = set(fetched[1].split())
    assert {name for stage in STAGES for name in stage.assets(Config())} <= names
    assert {find_asset(name).licence for name in names} == {"Apache-2.0"}


def test_prefect_is_silent_in_the_image() -> None:
    environment = next(text for keyword, text in instructions("") if keyword == "ENV")
    assert dict(item.split("=", 1) for item in environment.split()).items() >= SILENT.items()


def test_context_lets_in_what_is_named_only() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    copied = {Path(word).parts[0] for stage in ("builder", "") for keyword, text in instructions(stage)
              if keyword == "COPY" and not text.startswith("--from") for word in text.split()[:-1]}  # fmt: skip
    assert copied == {Path(rule[1:]).parts[0] for rule in rules if rule.startswith("!")}
