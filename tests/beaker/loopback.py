"""A Beaker of our own on loopback: the HTTP endpoint and the gRPC service that an unmodified beaker-py talks to.

It refuses what the real service is known to refuse by the client's source (names taken, unknown references, bad
tokens), and really runs the tasks. It says nothing about the real scheduler.
"""

from __future__ import annotations

import http.server
import json
import subprocess
import threading
import urllib.parse
import uuid
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.beaker.tasks import FINAL, Experiment, Replica, Status, now, pb2

grpc, rpc = pytest.importorskip("grpc"), pytest.importorskip("beaker.beaker_pb2_grpc")
TOKEN = "loopback-token-0123456789"
ANSWER = tuple[int, dict[str, Any]]


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for loopback: the client insists on TLS."""
    key, certificate = folder / "key", folder / "certificate"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return key, certificate


class Loopback(rpc.BeakerServicer):  # type: ignore[misc]
    """The service, as a context: ``with Loopback(folder, key=…, certificate=…) as beaker``."""

    def __init__(self, folder: Path, *, key: Path, certificate: Path) -> None:
        self.folder, self._key, self._certificate = folder, key, certificate
        self.images = {"henryh/rslp_multidataset_stable", "favyen/rslearn"}
        self.clusters = {"ai2/jupiter", "ai2/saturn"}
        self.workspaces = {"ai2/earth-systems", "ai2/other"}
        self.secrets: dict[str, str] = {}
        self.experiments: dict[str, Experiment] = {}
        self.changed = threading.Condition()
        # Set: requests are taken and never answered.
        self.silent = threading.Event()
        self.calls: list[str] = []
        self.runs_tasks = True
        # What happens to experiments: "lost" makes one and answers with an error, "refused" makes none,
        # "unheard" makes one and never answers again.
        self.fault = ""

    def __enter__(self) -> Loopback:
        self._grpc = grpc.server(futures.ThreadPoolExecutor(16), interceptors=[_Door(self)])
        rpc.add_BeakerServicer_to_server(self, self._grpc)
        pair = [(self._key.read_bytes(), self._certificate.read_bytes())]
        port = self._grpc.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
        self._grpc.start()
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        config = self.folder / "beaker.yml"
        addresses = {
            "agent_address": f"http://127.0.0.1:{self._http.server_port}",
            "rpc_address": f"127.0.0.1:{port}",
        }
        config.write_text(yaml.safe_dump({**addresses, "user_token": TOKEN, "default_org": "ai2"}))
        self.environment = {"BEAKER_CONFIG": str(config), "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(self._certificate)}
        return self

    def __exit__(self, *_: object) -> None:
        for experiment in self.experiments.values():
            experiment.kill()
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(0).wait()

    @property
    def only(self) -> Experiment:
        """The one experiment that was made."""
        (experiment,) = self.experiments.values()
        return experiment

    def wait_for_end(self, experiment: Experiment, *, seconds: float) -> int:
        """The final status of an experiment."""
        with self.changed:
            ended = self.changed.wait_for(lambda: experiment.workload.status in FINAL, timeout=seconds)
        assert ended, experiment.output()
        return int(experiment.workload.status)

    # What is sent over HTTP

    def create(self, workspace: str, name: str, spec: dict[str, Any]) -> ANSWER:
        task = spec["tasks"][0]
        wanted = [entry["secret"] for entry in task["envVars"] if "secret" in entry]
        wanted += [entry["source"]["secret"] for entry in task.get("datasets", []) if "secret" in entry["source"]]
        unknown = [secret for secret in wanted if secret not in self.secrets]
        if task["image"]["beaker"] not in self.images:
            return 404, {"message": "image not found"}
        if unknown or not set(task["constraints"]["cluster"]) <= self.clusters:
            return 400, {"message": f"not found: {unknown}"}
        if any(experiment.name == name for experiment in self.experiments.values()):
            return 409, {"message": f'experiment name "{name}" is already in use'}
        identity = "01" + uuid.uuid4().hex[:24].upper()
        made = pb2.Experiment(id=identity, name=name, workspace_id=workspace, created=now())
        workload = pb2.Workload(experiment=made, status=Status.STATUS_QUEUED)
        for _ in range(task.get("replicas") or 1):
            workload.experiment.tasks.add(id="TA" + uuid.uuid4().hex[:8], experiment_id=identity, name="main")
        folder = self.folder / identity
        retries = spec.get("retry", {}).get("allowedTaskRetries", 0)
        experiment = Experiment(identity, name, spec, workload, self.secrets, folder, self.changed, retries=retries)
        if self.fault == "refused":
            return 500, {"message": "broken"}
        self.experiments[identity] = experiment
        if self.fault == "unheard":
            self.silent.set()
            threading.Event().wait(5)
        if self.runs_tasks:
            with self.changed:
                experiment.start_all()
        return (500, {"message": "broken"}) if self.fault == "lost" else (200, {"id": identity})

    # What is asked over gRPC

    def ResolveWorkspaceName(self, request: Any, context: Any) -> Any:
        name = _known(f"{request.owner_name}/{request.workspace_name}", self.workspaces, context)
        return pb2.ResolveWorkspaceNameResponse(workspace_id="WS-" + name.replace("/", "-"))

    def GetWorkspace(self, request: Any, context: Any) -> Any:
        return pb2.GetWorkspaceResponse(workspace=pb2.Workspace(id=request.workspace_id))

    def ListWorkspaces(self, request: Any, context: Any) -> Any:
        return pb2.ListWorkspacesResponse(workspaces=[pb2.Workspace(id=w, name=w) for w in sorted(self.workspaces)])

    def ResolveOrganizationName(self, request: Any, context: Any) -> Any:
        return pb2.ResolveOrganizationNameResponse(organization_id="OR-" + request.organization_name)

    def ResolveImageName(self, request: Any, context: Any) -> Any:
        return pb2.ResolveImageNameResponse(
            image_id=_known(f"{request.author_name}/{request.image_name}", self.images, context)
        )

    def GetImage(self, request: Any, context: Any) -> Any:
        return pb2.GetImageResponse(image=pb2.Image(id=request.image_id, full_name=request.image_id))

    def ListImages(self, request: Any, context: Any) -> Any:
        part = request.options.image_name_or_description
        found = [pb2.Image(id=name, full_name=name) for name in sorted(self.images) if part in name]
        return pb2.ListImagesResponse(images=found)

    def ResolveClusterName(self, request: Any, context: Any) -> Any:
        return pb2.ResolveClusterNameResponse(
            cluster_id=_known(f"{request.owner_name}/{request.cluster_name}", self.clusters, context)
        )

    def GetCluster(self, request: Any, context: Any) -> Any:
        _known(request.cluster_id, self.clusters, context)
        return pb2.GetClusterResponse(cluster=pb2.Cluster(id=request.cluster_id, name=request.cluster_id))

    def ListClusters(self, request: Any, context: Any) -> Any:
        names = [name.rpartition("/")[2] for name in sorted(self.clusters)]
        return pb2.ListClustersResponse(clusters=[pb2.Cluster(id=name, name=name) for name in names])

    def ListSecrets(self, request: Any, context: Any) -> Any:
        return pb2.ListSecretsResponse(secrets=[pb2.Secret(name=name) for name in sorted(self.secrets)])

    def GetWorkload(self, request: Any, context: Any) -> Any:
        return pb2.GetWorkloadResponse(workload=self._experiment(request.workload_id, context).workload)

    def ListWorkloads(self, request: Any, context: Any) -> Any:
        part = request.options.name_or_description_substring
        found = [each.workload for each in self.experiments.values() if part in each.name]
        return pb2.ListWorkloadsResponse(workloads=found)

    def ListJobs(self, request: Any, context: Any) -> Any:
        jobs = [each.job for each in self._replicas() if request.options.task_id in ("", each.job.task_id)]
        return pb2.ListJobsResponse(jobs=jobs[::-1])

    def GetJob(self, request: Any, context: Any) -> Any:
        return pb2.GetJobResponse(job=self._replica(request.job_id, context).job)

    def StreamJobLogs(self, request: Any, context: Any) -> Any:
        replica, sent = self._replica(request.job_id, context), 0
        since = request.since.ToNanoseconds() if request.HasField("since") else 0
        while context.is_active():
            with self.changed:
                ended, new = replica.ended, replica.lines[sent:]
                sent += len(new)
                if not new and not ended and request.follow:
                    self.changed.wait(0.2)
            yield from (line for line in new if line.timestamp.ToNanoseconds() >= since)
            if not new and (ended or not request.follow):
                return

    def CancelWorkloads(self, request: Any, context: Any) -> Any:
        for identity in request.workload_ids:
            self._experiment(identity, context).cancel()
        return pb2.CancelWorkloadsResponse(workload_ids=request.workload_ids)

    def _replicas(self) -> list[Replica]:
        return [replica for experiment in self.experiments.values() for replica in experiment.replicas]

    def _replica(self, identity: str, context: Any) -> Replica:
        found = {replica.job.id: replica for replica in self._replicas()}
        return found[_known(identity, set(found), context)]

    def _experiment(self, identity: str, context: Any) -> Experiment:
        return self.experiments[_known(identity, set(self.experiments), context)]


def _known(name: str, known: set[str], context: Any) -> str:
    if name not in known:
        context.abort(grpc.StatusCode.NOT_FOUND, f"{name} not found")
    return name


class _Door(grpc.ServerInterceptor):  # type: ignore[misc]
    """Who has no token does not come in; when the service is silent, nobody gets an answer."""

    def __init__(self, beaker: Loopback) -> None:
        self._beaker = beaker

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        self._beaker.calls.append(details.method)
        code, said = grpc.StatusCode.UNAUTHENTICATED, "invalid token"
        if self._beaker.silent.is_set():
            code, said = grpc.StatusCode.UNAVAILABLE, "down"
        elif dict(details.invocation_metadata).get("authorization") == f"bearer {TOKEN}":
            return continuation(details)
        return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(code, said))


def _handler(beaker: Loopback) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            url = urllib.parse.urlparse(self.path)
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                code, answer = 401, {"message": "invalid token"}
            else:
                workspace = urllib.parse.unquote(url.path.split("/")[-2])
                code, answer = beaker.create(workspace, urllib.parse.parse_qs(url.query)["name"][0], body)
            content = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            beaker.calls.append(f"{self.command} {self.path}")

    return Handler
