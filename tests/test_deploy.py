"""The files of deploy/ agree with the server. No engine runs here: they are read."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from vitreous.cli import app
from vitreous.server import ServerConfig
from vitreous.training.devices import DistributionConfig
from vitreous.training.fit import Terminated

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


def parse_training(arguments):
    _, bound, *_ = app.parse_args(["train", *arguments], exit_on_error=False, print_error=False)
    found = vars(bound.arguments["distribution"])
    return DistributionConfig(**{name: value for name, value in found.items() if value is not None})


def test_the_pods_of_a_training_find_each_other():
    jobset = yaml.safe_load((ROOT / "deploy/training/jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    assert container["command"] == ["vitreous", "train"]
    (index,) = [entry["name"] for entry in container["env"] if "completion-index" in str(entry)]
    arguments = [argument.replace(f"$({index})", "3") for argument in container["args"]]
    config = parse_training(arguments)
    first = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}:"
    assert config.coordinator.startswith(first) and config.process_id == 3
    assert config.num_processes == pods["parallelism"] == pods["completions"]
    assert pods["backoffLimit"] == 0 and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_a_job_of_slurm_that_was_stopped_goes_back_into_the_queue():
    script = (ROOT / "deploy/training/slurm.sh").read_text()
    command = re.search(r"srun \S+ vitreous train (.*?)\ncode", script, re.DOTALL)[1].replace("\\\n", " ")
    assert parse_training(shlex.split(command)).coordinator == "auto"
    lines = re.findall(r"#SBATCH --([\w-]+)(?:=(\S+))?", script)
    assert ("signal", "TERM@120") in lines and ("requeue", "") in lines
    options = dict(lines)  # each process sees all GPUs of its machine: jax takes the one of its number there
    assert options["gpus-per-node"] == options["ntasks-per-node"] and "gpus-per-task" not in options
    assert f'"$code" -eq {Terminated().code} ]' in script
