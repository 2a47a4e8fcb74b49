"""A server on the loopback that answers what W&B's client asks of it in a sweep: create, agents, runs, metrics, reading back.

It proves the wiring, not W&B's search or order: points are handed out in the order of the grid."""
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml

KEY = "0" * 40
NOW = "2026-01-01T00:00:00"


class FakeWandb:
    "`with FakeWandb() as server:` then `server.env` for the processes, `server.runs` and `server.sweeps` for the tests"
    def __init__(self): self.sweeps, self.runs, self.agents, self.queues, self.asked, self.lock = {}, {}, {}, {}, [], threading.RLock()

    def __enter__(self):
        fake = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def log_message(self, *words): pass
            def _answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with fake.lock: answer = json.dumps(fake.answer(self.command, self.path, body)).encode()
                self.send_response(200)
                for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(answer)))): self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)
            do_GET = do_POST = do_PUT = _answer
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *connection: None  # a client that was ended
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.env = dict(WANDB_BASE_URL=self.url, WANDB_API_KEY=KEY, WANDB_MODE="online", WANDB_SILENT="false", WANDB_X_DISABLE_STATS="true", WANDB_ERROR_REPORTING="false")
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, method, path, body):
        if path.endswith("/file_stream"): return self.stream(unquote(path.split("/")[-2]), json.loads(body))
        if not path.startswith("/graphql"): return {}
        asked = json.loads(body)
        query, given = asked["query"], asked.get("variables") or {}
        name = (re.search(r"(?:query|mutation)\s+(\w+)", query) or [None, "?"])[1]
        self.asked.append(name)
        reply = getattr(self, f"on_{name}", lambda given: {})(given)
        return {"data": reply}

    def stream(self, run_id, content):
        run = self.runs[run_id]
        for name, part in (content.get("files") or {}).items():
            lines = [json.loads(line) for line in part["content"]] if name.endswith((".jsonl", "summary.json")) and "events" not in name else []
            if "history" in name: run["history"] += lines
            if "summary" in name: run["summary"] = lines[-1]
        if content.get("complete"): run["state"] = "finished" if content.get("exitcode") == 0 else "failed"
        return {}

    # --- what is asked, by its name in GraphQL

    def on_GetDefaultEntity(self, given): return {"viewer": {"id": "u", "entity": "us"}}
    def on_Viewer(self, given): return {"viewer": {"id": "u", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}}
    on_GetViewer = on_Viewer

    def on_UpsertSweep(self, given):
        config = yaml.safe_load(given["config"])
        name = f"s{len(self.sweeps) + 1}"
        self.sweeps[name] = dict(id=name, config=given["config"], project=given["projectName"])
        axes = {k: v["values"] if "values" in v else [v["value"]] for k, v in config["parameters"].items()}
        self.queues[name] = [dict(zip(axes, values)) for values in itertools.product(*axes.values())][:config.get("run_cap")]
        return {"upsertSweep": {"sweep": {"name": name, "project": {"id": "p", "name": given["projectName"], "entity": {"id": "e", "name": "us"}}}, "configValidationWarnings": []}}

    def on_CreateAgent(self, given):
        name = f"a{len(self.agents) + 1}"
        self.agents[name] = dict(sweep=given["sweep"], runs=[])
        return {"createAgent": {"agent": {"id": name}}}

    def on_Heartbeat(self, given):
        agent, busy = self.agents[given["id"]], any(json.loads(given["runState"] or "{}").values())
        commands = []
        if not busy and self.queues[agent["sweep"]]:
            run_id = f"{agent['sweep']}r{sum(r['sweep'] == agent['sweep'] for r in self.runs.values()) + 1}"
            args = self.queues[agent["sweep"]].pop(0)
            self.runs[run_id] = dict(id=run_id, sweep=agent["sweep"], state="pending", config={}, history=[], summary={}, agent=given["id"])
            agent["runs"].append(run_id)
            commands = [dict(type="run", run_id=run_id, program="bgrpo_nb", args={k: {"value": v} for k, v in args.items()})]
        elif not busy: commands = [dict(type="exit")]
        return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}}

    def on_UpsertBucket(self, given):
        run = self.runs.setdefault(given["name"], dict(id=given["name"], sweep=given.get("sweep"), state="pending", config={}, history=[], summary={}))
        run["state"] = "running"
        if given.get("config"): run["config"] |= json.loads(given["config"])
        return {"upsertBucket": {"bucket": self.node(run), "inserted": True, "configValidationWarnings": []}}

    def on_CreateRunFiles(self, given):
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": [{"name": f, "uploadUrl": f"{self.url}/upload/{f}"} for f in given["files"]]}}

    def on_GetSweep(self, given): return {"project": {"sweep": self.sweep(given["name"])}}
    def on_SweepWithRuns(self, given): return {"project": {"sweep": self.sweep(given["sweep"]) | {"runs": {"edges": []}}}}

    def on_Runs(self, given):
        found = [r for r in self.runs.values() if f'"{r["sweep"]}"' in (given.get("filters") or "")]
        return {"project": {"internalId": "1", "runCount": len(found), "readOnly": False, "runs": {
            "edges": [{"node": self.node(r), "cursor": r["id"]} for r in found], "pageInfo": {"endCursor": "", "hasNextPage": False}}}}

    def on_Run(self, given): return {"project": {"internalId": "1", "run": self.node(self.runs[given["name"]])}}
    def on_RunSampledHistory(self, given): return {"project": {"run": {"sampledHistory": [self.runs[given["name"]]["history"]]}}}
    def on_RunFullHistory(self, given): return {"project": {"run": {"history": [json.dumps(row) for row in self.runs[given["name"]]["history"]]}}}

    def sweep(self, name):
        if (s := self.sweeps.get(name)) is None: return None
        config = yaml.safe_load(s["config"])
        return dict(__typename="Sweep", id=name, name=name, displayName=config.get("name"), method=config["method"], state="FINISHED" if not self.queues[name] else "RUNNING", description=None,
                    bestLoss=None, config=s["config"], createdAt=NOW, updatedAt=NOW, heartbeatAt=NOW, runCount=len(self.runs), runCountExpected=None, controller=None, scheduler=None)

    def node(self, run):
        return dict(__typename="Run", id=run["id"], projectId="1", name=run["id"], displayName=run["id"], sweepName=run["sweep"], state=run["state"], config=json.dumps(run["config"]),
                    summaryMetrics=json.dumps(run["summary"]), systemMetrics="{}", historyLineCount=len(run["history"]), historyKeys={"keys": {}, "sets": [], "lastStep": 0}, tags=[], group=None,
                    jobType=None, commit=None, readOnly=False, createdAt=NOW, heartbeatAt=NOW, description=None, notes=None, user={"name": "us", "username": "us"},
                    project={"id": "p", "name": "p", "entity": {"id": "e", "name": "us"}})
