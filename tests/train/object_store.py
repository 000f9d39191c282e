"""Object stores for tests: servers on this machine that speak as much of Google Cloud Storage's
JSON API, and of Amazon S3's API, as orbax, tensorstore, gcsfs and s3fs ask for. Their objects are
whole, listed by prefix, and cannot be renamed or appended to."""

import base64
import hashlib
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape


class Store(ThreadingHTTPServer):
    """A server of objects.

    Attributes:
      scheme: of its addresses, "gs" or "s3".
      objects: data and generation of each, by "BUCKET/NAME".
      changes: every object that was written, with its data, or deleted, with None, in this order.
      refused: a pattern of the names that may not be written, or None.
      environment: with which the clients find the server, and look for no credentials.
    """

    daemon_threads = True

    def __init__(self, scheme):
        super().__init__(("127.0.0.1", 0), {"gs": Google, "s3": Amazon}[scheme])
        self.scheme = scheme
        self.objects = {}
        self.changes = []
        self.refused = None
        self.lock = threading.Lock()
        self.generations = itertools.count(1)
        self.uploads = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.environment = self.RequestHandlerClass.environment(self.url)

    def handle_error(self, request, client_address):
        """Clients leave when another of their requests was quicker."""

    def put(self, key, data):
        self.changes.append((key, data))
        self.objects[key] = (data, next(self.generations))

    def delete(self, key):
        self.changes.append((key, None))
        del self.objects[key]

    def key(self, address):
        return address.removeprefix(f"{self.scheme}://")

    def below(self, address):
        """The objects in a directory and in those below it, by their names in it."""
        start = self.key(address) + "/"
        return {
            name.removeprefix(start): data
            for name, (data, _) in sorted(self.objects.items())
            if name.startswith(start)
        }


class Handler(BaseHTTPRequestHandler):
    """What the stores have in common. `answer` is for one request at a time."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet: in two, the second waits for the first to be noticed

    def log_message(self, *args):
        pass

    def handle_expect_100(self):
        super().handle_expect_100()
        self.wfile.flush()  # the client waits for it
        return True

    def do_GET(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        url = urlsplit(self.path)
        values = parse_qs(url.query, keep_blank_values=True)
        query = {name: value[-1] for name, value in values.items()}
        with self.server.lock:
            status, headers, content = self.answer(self.command, url.path, query, body)
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self, method, path, query, body):
        """Status, headers and content."""
        raise NotImplementedError

    def refuses(self, key):
        return self.server.refused and re.search(self.server.refused, key)

    def names(self, bucket, prefix, delimiter):
        """The names of the objects that a listing has, and of what it has for directories."""
        found, below = [], set()
        for key in sorted(self.server.objects):
            name = key.removeprefix(f"{bucket}/")
            if key == name or not name.startswith(prefix):
                continue
            head, separator, _ = name[len(prefix) :].partition(delimiter or "\0")
            if separator:
                below.add(prefix + head + separator)
            else:
                found.append(name)
        return found, sorted(below)

    def read(self, data, headers):
        """The part that is wanted of an object's data."""
        headers = {"Content-Type": "application/octet-stream", **headers}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return 200, headers, data
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if start >= len(data):
            return 416, headers, b""
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return 206, headers, data[start : end + 1]


class Google(Handler):
    @staticmethod
    def environment(url):
        return {
            "TENSORSTORE_GCS_HTTP_URL": url,
            "STORAGE_EMULATOR_HOST": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def answer(self, method, path, query, body):
        if path == "/batch/storage/v1":
            return self.batch(body)
        if path.startswith("/upload/"):
            return self.upload(method, path, query, body)
        match = re.fullmatch(
            r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?"
            r"(?:/(rewriteTo|moveTo)(?:/b/([^/]+))?/o/(.+))?",
            path,
        )
        if match is None:
            return 501, {}, {"error": {"code": 501, "message": f"{method} {path}"}}
        bucket, name, how, to_bucket, to_name = (part and unquote(part) for part in match.groups())
        key = f"{bucket}/{name}"
        objects = self.server.objects
        if name is None:
            return self.list(bucket, query) if path.endswith("/o") else (200, {}, {"name": bucket})
        if key not in objects:
            return 404, {}, {"error": {"code": 404, "message": f"No such object: {key}"}}
        data, generation = objects[key]
        if method == "DELETE":
            self.server.delete(key)
            return 204, {}, b""
        if how is not None:
            to = f"{to_bucket or bucket}/{to_name}"
            self.server.put(to, data)
            if how == "moveTo":
                self.server.delete(key)
                return 200, {}, self.resource(to)
            return 200, {}, {"done": True, "resource": self.resource(to)}
        if query.get("alt") != "media":
            return 200, {}, self.resource(key)
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, {}, b""
        return self.read(data, {"x-goog-generation": str(generation)})

    def list(self, bucket, query):
        found, below = self.names(bucket, query.get("prefix", ""), query.get("delimiter"))
        items = [self.resource(f"{bucket}/{name}") for name in found]
        return 200, {}, {"kind": "storage#objects", "items": items, "prefixes": below}

    def upload(self, method, path, query, body):
        bucket = unquote(path.split("/")[5])
        if query["uploadType"] == "resumable":
            if method == "POST" and "upload_id" not in query:
                number = str(len(self.server.uploads))
                self.server.uploads[number] = (f"{bucket}/{query['name']}", bytearray())
                url = f"{self.server.url}{path}?uploadType=resumable&upload_id={number}"
                return 200, {"Location": url}, {}
            key, data = self.server.uploads[query["upload_id"]]
            data += body
            total = self.headers.get("Content-Range", "/0").rpartition("/")[2]
            if total == "*" or len(data) < int(total):
                return 308, {"Range": f"bytes=0-{len(data) - 1}"}, b""
            return self.written(key, bytes(data), query)
        if query["uploadType"] == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, description, content, _ = re.split(rb"\r?\n?--" + re.escape(boundary), body)
            name = json.loads(re.split(rb"\r?\n\r?\n", description, maxsplit=1)[1])["name"]
            body = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
            return self.written(f"{bucket}/{name}", body, query)
        return self.written(f"{bucket}/{query['name']}", body, query)

    def written(self, key, data, query):
        if self.refuses(key):
            return 403, {}, {"error": {"code": 403, "message": f"no writing of {key}"}}
        _, generation = self.server.objects.get(key, (b"", 0))
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return 412, {}, {"error": {"code": 412, "message": "the generation is another"}}
        self.server.put(key, data)
        return 200, {}, self.resource(key)

    def resource(self, key):
        data, generation = self.server.objects[key]
        bucket, _, name = key.partition("/")
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(data)),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def batch(self, body):
        boundary = "answers"
        parts = []
        for path in re.findall(rb"DELETE (\S+) HTTP", body):
            status, _, _ = self.answer("DELETE", path.decode(), {}, b"")
            parts.append(
                f"--{boundary}\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} x\r\n\r\n"
            )
        content = "".join(parts) + f"--{boundary}--"
        return 200, {"Content-Type": f"multipart/mixed; boundary={boundary}"}, content.encode()


class Amazon(Handler):
    PAGE = 20  # a thousand in truth

    @staticmethod
    def environment(url):
        return {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def answer(self, method, path, query, body):
        bucket, _, name = unquote(path).removeprefix("/").partition("/")
        key = f"{bucket}/{name}"
        objects = self.server.objects
        if not name:
            if method == "HEAD":
                return 200, {"x-amz-bucket-region": "us-east-1"}, b""
            if method == "POST" and "delete" in query:
                return self.delete(bucket, body)
            if method == "GET" and query.get("list-type") == "2":
                return self.list(bucket, query)
            return self.error(501, f"{method} {path}?{query}")
        if "uploads" in query:
            number = str(len(self.server.uploads))
            self.server.uploads[number] = {}
            return self.xml("InitiateMultipartUploadResult", ("UploadId", number))
        if "uploadId" in query:
            return self.upload(method, key, query, body)
        if method == "PUT":
            if source := unquote(self.headers.get("x-amz-copy-source", "")).removeprefix("/"):
                if source not in objects:
                    return self.error(404, "NoSuchKey")
                return self.written(key, objects[source][0], "CopyObjectResult")
            return self.written(key, body)
        if method == "DELETE":
            if key in objects:
                self.server.delete(key)
            return 204, {}, b""
        if key not in objects:
            return self.error(404, "NoSuchKey")
        data, _ = objects[key]
        headers = {"ETag": self.etag(data), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if self.headers.get("If-None-Match") == self.etag(data):
            return 304, headers, b""
        if self.headers.get("If-Match", self.etag(data)) != self.etag(data):
            return self.error(412, "PreconditionFailed")
        return self.read(data, headers)

    def list(self, bucket, query):
        found, below = self.names(bucket, query.get("prefix", ""), query.get("delimiter"))
        after = query.get("continuation-token") or query.get("start-after", "")
        page = [name for name in sorted([*found, *below]) if name > after]
        page, rest = page[: self.PAGE], page[self.PAGE :]
        encoded = quote if query.get("encoding-type") == "url" else escape
        parts = [("KeyCount", str(len(page))), ("IsTruncated", str(bool(rest)).lower())]
        if rest:
            parts.append(("NextContinuationToken", page[-1]))
        for name in page:
            if name in below:
                parts.append(("CommonPrefixes", [("Prefix", encoded(name))]))
                continue
            data, _ = self.server.objects[f"{bucket}/{name}"]
            described = [("Key", encoded(name)), ("Size", str(len(data)))]
            described += [("ETag", self.etag(data)), ("LastModified", "2026-01-01T00:00:00.000Z")]
            parts.append(("Contents", described))
        return self.xml("ListBucketResult", *parts)

    def delete(self, bucket, body):
        for element in ElementTree.fromstring(body).iter():
            if element.tag.endswith("}Key") and f"{bucket}/{element.text}" in self.server.objects:
                self.server.delete(f"{bucket}/{element.text}")
        return self.xml("DeleteResult")

    def upload(self, method, key, query, body):
        parts = self.server.uploads[query["uploadId"]]
        if method == "PUT":
            parts[int(query["partNumber"])] = body
            return 200, {"ETag": self.etag(body)}, b""
        if method == "DELETE":
            return 204, {}, b""
        data = b"".join(parts[number] for number in sorted(parts))
        return self.written(key, data, "CompleteMultipartUploadResult")

    def written(self, key, data, result=None):
        if self.refuses(key):
            return self.error(403, "AccessDenied")
        present = self.etag(self.server.objects[key][0]) if key in self.server.objects else None
        if self.headers.get("If-None-Match") == "*" and present:
            return self.error(412, "PreconditionFailed")
        if self.headers.get("If-Match", present) != present:
            return self.error(412, "PreconditionFailed")
        self.server.put(key, data)
        if result is None:
            return 200, {"ETag": self.etag(data)}, b""
        return self.xml(result, ("ETag", self.etag(data)))

    def etag(self, data):
        return f'"{hashlib.md5(data).hexdigest()}"'

    def error(self, status, code):
        _, headers, content = self.xml("Error", ("Code", code), ("Message", code))
        return status, headers, content

    def xml(self, name, *parts):
        def text(name, content):
            inner = content if isinstance(content, str) else "".join(text(*c) for c in content)
            return f"<{name}>{inner}</{name}>"

        return 200, {"Content-Type": "application/xml"}, text(name, parts).encode()
