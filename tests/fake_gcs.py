"""A Google Cloud Storage in memory, for tests: JSON and XML API over HTTP on loopback.

It knows what obstore, tensorstore, gcsfs and array_record send: whole and ranged reads, uploads
(media, multipart, resumable, XML) with the preconditions that make a create exclusive, listings
by pages, copies, deletions. `counts` counts the requests by kind, and the names that were read;
`latency` and `faults` make it slow and unreliable. `python tests/fake_gcs.py PORT` serves until it
is killed.
"""

import base64
import json
import re
import socket
import sys
import threading
import time
import xml.sax.saxutils
from collections import Counter
from contextlib import contextmanager
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

PAGE = 1000  # objects of a listing's page
BEGUN = "2026-01-01T00:00:00.000Z"
NO_BUCKET_KIND = "/storageLayout"  # gcsfs asks whether a bucket is hierarchical


class Object(NamedTuple):
    """A stored object."""

    content: bytes
    generation: int
    made: float  # seconds since 1970


class FakeGCS(ThreadingHTTPServer):
    """The server; its buckets need not be made.

    `faults` are functions of (method, path) that return None, "503", "403", or "cut": close the
    connection after the request was done, so that the client does not learn of it.
    """

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.objects: dict[tuple[str, str], Object] = {}
        self.lock, self.generation = threading.Lock(), 0
        self.counts, self.reads = Counter(), Counter()
        self.sent = 0  # bytes of contents
        self.latency, self.faults, self.uploads = 0.0, [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def put(self, bucket: str, name: str, content: bytes, if_generation: str | None) -> int | None:
        """Store an object; return its generation, or None if the condition does not hold."""
        with self.lock:
            old = self.objects.get((bucket, name))
            if if_generation is not None and int(if_generation) != (old.generation if old else 0):
                return None
            self.generation += 1
            self.objects[bucket, name] = Object(content, self.generation, time.time())
            return self.generation

    def remove(self, bucket: str, name: str, if_generation: str | None) -> int:
        """Delete an object; return the HTTP status."""
        with self.lock:
            old = self.objects.get((bucket, name))
            if old is None:
                return 404
            if if_generation is not None and int(if_generation) != old.generation:
                return 412
            del self.objects[bucket, name]
            return 204

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Return the sorted names of the objects below a prefix."""
        with self.lock:
            return sorted(n for b, n in self.objects if b == bucket and n.startswith(prefix))

    def handle_error(self, request, client_address) -> None:
        """Say nothing of clients that went away."""


@contextmanager
def fake_gcs(monkeypatch):
    """Serve, with the variables by which obstore, tensorstore and gcsfs find the server."""
    with FakeGCS() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in variables(server.url).items():
            monkeypatch.setenv(name, value)
        yield server
        server.shutdown()


def variables(url: str) -> dict[str, str]:
    """Return the environment of a client."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks for the bucket's kind by gRPC
        "NO_GCE_CHECK": "true",
        "GCE_METADATA_ROOT": "127.0.0.1:9",
    }


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: FakeGCS

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *_) -> None:
        """Say nothing."""

    def handle_any(self) -> None:
        """Read the request, count it, play its fault, and answer."""
        size = int(self.headers.get("Content-Length") or 0)
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        self.body = self._chunks() if chunked else self.rfile.read(size)
        url = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        faults = [fault(self.command, self.path) for fault in list(self.server.faults)]
        if self.server.latency:
            time.sleep(self.server.latency)
        self.cut = "cut" in faults
        if "503" in faults:
            return self._answer(503, b"try again")
        if "403" in faults:
            return self._answer(403, b"you may not")
        path = url.path
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            return self._json({"name": match[1], "kind": "storage#bucket"})
        if path.endswith(NO_BUCKET_KIND):
            return self._json({"kind": "storage#storageLayout"})
        if match := re.fullmatch(r"/(?:download/|upload/)?storage/v1/b/([^/]+)/o(?:/(.*))?", path):
            bucket, name = match[1], unquote(match[2]) if match[2] else None
            if path.startswith("/upload/"):
                return self._upload(bucket)
            if name is None:
                return self._list_json(bucket)
            return self._object_json(bucket, name)
        bucket, _, name = unquote(path).lstrip("/").partition("/")
        return self._xml(bucket, name)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = handle_any

    def _xml(self, bucket: str, name: str) -> None:
        if self.command == "GET" and not name:
            return self._list_xml(bucket)
        if "uploads" in self.query or "uploadId" in self.query:
            return self._in_parts(bucket, name)
        if self.command == "PUT":
            if source := self.headers.get("x-goog-copy-source"):
                bucket0, _, name0 = unquote(source).lstrip("/").partition("/")
                self.body = self.server.objects[bucket0, name0].content
            condition = self.headers.get("x-goog-if-generation-match")
            made = self.server.put(bucket, name, self.body, condition)
            self.server.counts["put"] += 1
            tag = {} if made is None else {"ETag": f'"{made}"', "x-goog-generation": str(made)}
            return self._answer(412 if made is None else 200, b"", tag)
        if self.command == "DELETE":
            self.server.counts["delete"] += 1
            status = self.server.remove(bucket, name, None)
            return self._answer(status)
        return self._content(bucket, name)

    def _in_parts(self, bucket: str, name: str) -> None:
        number = self.query.get("uploadId", f"x{len(self.server.uploads)}")
        parts = self.server.uploads.setdefault(number, {})
        if "partNumber" in self.query:
            parts[int(self.query["partNumber"])] = self.body
            return self._answer(200, b"", {"ETag": f'"{self.query["partNumber"]}"'})
        if self.command == "DELETE":
            return self._answer(204)
        if "uploads" in self.query:
            text = f"<Bucket>{bucket}</Bucket><UploadId>{number}</UploadId>"
            root = "InitiateMultipartUploadResult"
        else:
            content = b"".join(parts[n] for n in sorted(parts))
            self.server.counts["put"] += 1
            made = self.server.put(bucket, name, content, None)
            text, root = f"<ETag>{made}</ETag>", "CompleteMultipartUploadResult"
        return self._answer(200, f"<{root}>{text}</{root}>".encode())

    def _object_json(self, bucket: str, name: str) -> None:
        if match := re.fullmatch(r"(.*)/(rewriteTo|copyTo|moveTo)/(?:b/([^/]+)/)?o/(.*)", name):
            source = self.server.objects.get((bucket, match[1]))
            if source is None:
                return self._answer(404, b"{}")
            target = match[3] or bucket
            self.server.put(target, match[4], source.content, None)
            if match[2] == "moveTo":
                self.server.remove(bucket, match[1], None)
            told = self._told(target, match[4])
            self.server.counts["copy"] += 1
            more = {"done": True, "resource": told} if match[2] == "rewriteTo" else told
            return self._json(more)
        if self.command == "DELETE":
            self.server.counts["delete"] += 1
            status = self.server.remove(bucket, name, self.query.get("ifGenerationMatch"))
            return self._answer(status)
        if self.query.get("alt") == "media":
            return self._content(bucket, name)
        self.server.counts["head"] += 1
        told = self._told(bucket, name)
        return self._json(told) if told else self._answer(404, b"{}")

    def _content(self, bucket: str, name: str) -> None:
        found = self.server.objects.get((bucket, name))
        self.server.counts["head" if self.command == "HEAD" else "get"] += 1
        if found is None:
            return self._answer(404, b"")
        wanted = self.query.get("ifGenerationNotMatch")
        if wanted is not None and int(wanted) == found.generation:
            return self._answer(304, b"")
        content, status = found.content, 200
        headers = {"ETag": f'"{found.generation}"', "x-goog-generation": str(found.generation)}
        headers |= {
            "Last-Modified": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(found.made))
        }
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            size = len(content)
            if match[1]:
                begin, end = int(match[1]), min(int(match[2] or size - 1), size - 1) + 1
            else:
                begin, end = max(0, size - int(match[2])), size
            if begin >= size:
                return self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
            content, status = content[begin:end], 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        if self.command != "HEAD":
            self.server.reads[name] += 1
            self.server.sent += len(content)
        return self._answer(status, content, headers)

    def _upload(self, bucket: str) -> None:
        kind, condition = self.query.get("uploadType"), self.query.get("ifGenerationMatch")
        name = self.query.get("name")
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parts = BytesParser().parsebytes(head + self.body).get_payload()
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            name = name or json.loads(parts[0].get_payload())["name"]
            raw = self.body.split(b"--" + boundary)[2]  # the parser would change line ends
            raw = raw.partition(b"\r\n\r\n" if b"\r\n\r\n" in raw else b"\n\n")[2]
            content = raw[:-2] if raw.endswith(b"\r\n") else raw.removesuffix(b"\n")
        elif kind == "resumable" and "upload_id" not in self.query:
            name = name or json.loads(self.body)["name"]
            number = str(len(self.server.uploads))
            self.server.uploads[number] = [name, condition, b""]
            place = f"{self.server.url}{urlsplit(self.path).path}?uploadType=resumable"
            return self._answer(200, b"", {"Location": f"{place}&upload_id={number}"})
        elif kind == "resumable":
            upload = self.server.uploads[self.query["upload_id"]]
            upload[2] += self.body
            if self.headers.get("Content-Range", "").endswith("/*"):
                last = len(upload[2]) - 1
                return self._answer(308, b"", {"Range": f"bytes=0-{last}"})
            name, condition, content = upload
        else:
            content = self.body
        self.server.counts["put"] += 1
        made = self.server.put(bucket, name, content, condition)
        return self._answer(412, b"{}") if made is None else self._json(self._told(bucket, name))

    def _told(self, bucket: str, name: str) -> dict | None:
        found = self.server.objects.get((bucket, name))
        if found is None:
            return None
        crc = google_crc32c.value(found.content).to_bytes(4, "big")
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(found.content)),
            "generation": str(found.generation),
            "metageneration": "1",
            "timeCreated": BEGUN,
            "updated": BEGUN,
            "crc32c": base64.b64encode(crc).decode(),
            "etag": str(found.generation),
        }

    def _page(self, bucket: str, after: str, limit: int) -> tuple[list[str], list[str], str]:
        """Return names, common prefixes and the token of the next page."""
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        begin, end = self.query.get("startOffset", ""), self.query.get("endOffset", "")
        names, folders = [], []
        for name in self.server.names(bucket, prefix):
            rest = name[len(prefix) :]
            cut = rest.find(delimiter) if delimiter else -1
            shown = name if cut < 0 else prefix + rest[: cut + len(delimiter)]
            if shown <= after or name < begin or (end and name >= end):
                continue
            if cut < 0:
                names.append(name)
            elif shown not in folders[-1:]:
                folders.append(shown)
            if len(names) + len(folders) > limit:
                last = sorted((names[-1:] or [""]) + (folders[-1:] or [""]))[-1]
                (names if last in names[-1:] else folders).pop()
                return names, folders, sorted((names[-1:] or [""]) + (folders[-1:] or [""]))[-1]
        return names, folders, ""

    def _list_json(self, bucket: str) -> None:
        self.server.counts["list"] += 1
        limit = int(self.query.get("maxResults", PAGE))
        names, folders, token = self._page(bucket, self.query.get("pageToken", ""), limit)
        answer = {"kind": "storage#objects", "items": [self._told(bucket, n) for n in names]}
        answer |= {"prefixes": folders} | ({"nextPageToken": token} if token else {})
        self._json(answer)

    def _list_xml(self, bucket: str) -> None:
        self.server.counts["list"] += 1
        after = max(self.query.get("continuation-token", ""), self.query.get("start-after", ""))
        names, folders, token = self._page(bucket, after, int(self.query.get("max-keys", PAGE)))
        safe = xml.sax.saxutils.escape
        items = "".join(
            f"<Contents><Key>{safe(n)}</Key><LastModified>{_iso(found.made)}</LastModified>"
            f"<ETag>&quot;{found.generation}&quot;</ETag><Size>{len(found.content)}</Size>"
            f"</Contents>"
            for n in names
            if (found := self.server.objects.get((bucket, n)))
        )
        prefixes = "".join(
            f"<CommonPrefixes><Prefix>{safe(p)}</Prefix></CommonPrefixes>" for p in folders
        )
        more = f"<NextContinuationToken>{safe(token)}</NextContinuationToken>" if token else ""
        text = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
            f"<Name>{bucket}</Name><IsTruncated>{str(bool(token)).lower()}</IsTruncated>"
            f"{items}{prefixes}{more}</ListBucketResult>"
        )
        self._answer(200, text.encode(), {"Content-Type": "application/xml"})

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, value: dict | None) -> None:
        content = json.dumps(value).encode()
        self._answer(200, content, {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes = b"", headers: dict | None = None) -> None:
        if self.cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


if __name__ == "__main__":
    FakeGCS(int(sys.argv[1])).serve_forever()
