"""The files of deploy/ agree with the server. No engine runs here: they are read."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from vitreous.cli import app
from vitreous.server import ServerConfig

ROOT = Path(__file__).parents[1]
MANIFESTS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / "deploy/kubernetes").glob("*.yaml")}
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ")
PROBES = {"/v2/health/live", "/v2/health/ready"}


def instructions(name):
    return [line.split(maxsplit=1)[1] for line in DOCKERFILE.splitlines() if line.startswith(f"{name} ")]


def pod():
    return MANIFESTS["deployment.yaml"]["spec"]["template"]["spec"]


def parse(arguments):
    """Returns the configuration that words of the command line make, as if the command ran."""
    _, bound, *_ = app.parse_args(["serve", *arguments], exit_on_error=False, print_error=False)
    return ServerConfig(**{k: v for k, v in vars(bound.arguments["options"]).items() if v is not None})


def test_the_container_starts_a_server_that_others_can_reach():
    (entry,), (words,) = (map(json.loads, instructions(name)) for name in ("ENTRYPOINT", "CMD"))
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert entry[0] in scripts and entry[1] == "serve"
    config = parse(words)
    assert (config.host, str(config.token_file)) == ("0.0.0.0", "/run/secrets/token")
    assert instructions("EXPOSE") == [str(config.port)]
    assert instructions("USER")[0].split(":")[0] not in ("0", "root")
    assert any(path in instructions("HEALTHCHECK")[0] for path in PROBES)


def test_the_container_copies_and_installs_what_there_is():
    for sources in instructions("COPY"):
        for source in sources.split()[:-1]:
            assert (ROOT / source).exists(), source
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"requirements/(\w+)\.txt", DOCKERFILE)
    assert named and set(named) <= set(extras)


def test_the_manifests_belong_together():
    assert set(MANIFESTS["kustomization.yaml"]["resources"]) == set(MANIFESTS) - {"kustomization.yaml"}
    labels = MANIFESTS["deployment.yaml"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        MANIFESTS["deployment.yaml"]["spec"]["selector"]["matchLabels"],
        MANIFESTS["service.yaml"]["spec"]["selector"],
        MANIFESTS["disruption.yaml"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    (container,) = pod()["containers"]
    (port,) = container["ports"]
    assert MANIFESTS["service.yaml"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod()["volumes"]}


def test_the_pod_is_given_the_time_and_the_cores_that_the_server_takes():
    (container,) = pod()["containers"]
    config = parse(container["args"])
    assert container["ports"][0]["containerPort"] == config.port
    assert config.num_threads == int(container["resources"]["limits"]["cpu"])
    longest = config.drain_seconds + config.body_seconds + config.deadline_seconds
    assert pod()["terminationGracePeriodSeconds"] > longest
    readiness = container["readinessProbe"]
    assert config.drain_seconds > readiness["periodSeconds"] * readiness["failureThreshold"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert str(config.token_file.parent) in mounts and container["args"][0] in mounts


@pytest.mark.parametrize("name", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probes_ask_what_needs_no_token(name):
    (container,) = pod()["containers"]
    assert container[name]["httpGet"]["path"] in PROBES
    assert container[name]["httpGet"]["port"] == container["ports"][0]["name"]


def test_the_pod_may_do_little():
    (container,) = pod()["containers"]
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    assert context["capabilities"]["drop"] == ["ALL"]
    assert pod()["securityContext"]["runAsNonRoot"] and not pod()["automountServiceAccountToken"]
