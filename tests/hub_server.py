"""A small Hub: the part of its protocol that huggingface_hub speaks for downloads and uploads (LFS, not Xet).

Run as a process of its own, `python hub_server.py`; it prints the URL to use as HF_ENDPOINT. Repositories are in
memory. Large files are redirected to a second port, another origin, as the Hub redirects to its CDN: an Authorization
header that arrives there is refused, as signed URLs do. `/_test/...` is for the tests: faults to come, requests so far.
"""
import base64
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = 'hf_test'  # may write, and read what is private
LOCK = threading.RLock()


class Hub:
    def __init__(self):
        self.repos, self.blobs = {}, {}
        self.url = self.cdn_url = ''
        self.reset()

    def reset(self):
        self.faults, self.log = [], []

    def create(self, name, private=False):
        self.repos[name] = {'private': private, 'refs': {}, 'commits': {}}
        self.commit(name, 'main', {})

    def commit(self, name, branch, changes):
        """Changes are path -> (kind, content or oid), or None for a deletion."""
        repo = self.repos[name]
        files = dict(repo['commits'].get(repo['refs'].get(branch), {}))
        for path, change in changes.items():
            files.pop(path, None)
            if change is not None:
                files[path] = change
        sha = hashlib.sha1(repr((name, len(repo['commits']), sorted(files))).encode()).hexdigest()
        repo['commits'][sha] = files
        repo['refs'][branch] = sha
        return sha

    def resolve(self, name, revision):
        repo = self.repos[name]
        return revision if revision in repo['commits'] else repo['refs'].get(revision)


HUB = Hub()


def git_sha(content):
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def answer(self, status, body=b'', headers=(), fault=None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = dict(headers)
        headers.setdefault('Content-Length', str(len(content)))
        if not isinstance(body, bytes):
            headers.setdefault('Content-Type', 'application/json')
        if fault and 'etag' in fault:
            headers.update({key: f'"{fault["etag"]}"' for key in headers if key in ('ETag', 'X-Linked-ETag')})
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        if fault and 'flip' in fault:
            content = bytearray(content)
            content[fault['flip']] ^= 255
        if fault and 'cut' in fault:
            self.wfile.write(content[:fault['cut']])
            self.close_connection = True
            return
        self.wfile.write(content)

    def error(self, status, code='', message=''):
        self.answer(status, {'error': message or code}, {'X-Error-Code': code, 'X-Error-Message': message or code})

    def handle_method(self):
        url = urlsplit(self.path)
        length = int(self.headers.get('Content-Length') or 0)
        body = self.rfile.read(length)
        path = unquote(url.path)
        if path.startswith('/_test/'):
            return self.control(path, body)
        with LOCK:
            HUB.log.append({'method': self.command, 'path': path, 'range': self.headers.get('Range'),
                            'auth': self.headers.get('Authorization')})
            fault = next((f for f in HUB.faults if f.get('method', self.command) == self.command
                          and re.search(f['path'], path) and f['times'] > 0), None)
            if fault:
                fault['times'] -= 1
        if fault and 'drop' in fault:
            self.close_connection = True
            return
        if fault and 'status' in fault:
            self.answer(fault['status'], {'error': fault.get('message', 'fault')}, fault.get('headers', {}))
            return
        if self.server.is_cdn:
            return self.cdn(path, body, fault)
        auth = self.headers.get('Authorization')
        if auth and auth != f'Bearer {TOKEN}':
            return self.error(401, '', 'Invalid credentials in Authorization header')
        for pattern, method in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                return method(self, *match.groups(), body=body, query=parse_qs(url.query), fault=fault)
        self.error(404, '', f'no route for {self.command} {path}')

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_method

    def may(self, name, write=False):
        """Whether the repository is there for this client; if not, the answer has been given."""
        known = bool(self.headers.get('Authorization'))
        repo = HUB.repos.get(name)
        if repo is None or (repo['private'] and not known):
            self.error(404 if known else 401, 'RepoNotFound', 'Repository not found')
        elif write and not known:
            self.error(401, '', 'Invalid username or password.')
        else:
            return True

    # downloads

    def resolve(self, name, revision, path, *, fault, **_):
        if not self.may(name):
            return
        sha = HUB.resolve(name, revision)
        if sha is None:
            return self.error(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        commit = {'X-Repo-Commit': sha}
        file = HUB.repos[name]['commits'][sha].get(path)
        if file is None:
            return self.answer(
                404, {'error': 'Entry not found'},
                {**commit, 'X-Error-Code': 'EntryNotFound', 'X-Error-Message': 'Entry not found'})
        kind, content = file
        if kind == 'lfs':
            self.answer(302, b'', {
                **commit, 'X-Linked-ETag': f'"{content}"', 'X-Linked-Size': str(len(HUB.blobs[content])),
                'Location': f'{HUB.cdn_url}/{content}?signature=1', 'Content-Length': '0'}, fault)
        elif self.path.startswith('/api/resolve-cache'):
            self.send(content, {**commit, 'ETag': f'"{git_sha(content)}"'}, fault)
        else:
            location = f'/api/resolve-cache/models/{name}/{sha}/{path}'
            self.answer(307, b'', {**commit, 'X-Linked-ETag': f'"{git_sha(content)}"', 'Location': location}, fault)

    def cdn(self, path, body, fault):
        oid = path.strip('/')
        if self.headers.get('Authorization'):
            return self.answer(400, b'only one authentication mechanism is allowed')
        if self.command == 'PUT':
            if hashlib.sha256(body).hexdigest() != oid:
                return self.answer(400, b'content does not match')
            HUB.blobs[oid] = body
            return self.answer(200)
        self.send(HUB.blobs[oid], {'ETag': '"of-the-cdn"'}, fault)

    def send(self, content, headers, fault):
        match = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
        if match:
            start = int(match[1])
            headers = {**headers, 'Content-Range': f'bytes {start}-{len(content) - 1}/{len(content)}'}
            return self.answer(206, content[start:], headers, fault)
        self.answer(200, content, {**headers, 'Accept-Ranges': 'bytes'}, fault)

    # uploads

    def create_repo(self, *, body, **_):
        if not self.headers.get('Authorization'):
            return self.error(401, '', 'Invalid username or password.')
        body = json.loads(body)
        name = f'{body["organization"] or "USER"}/{body["name"]}'
        answer = {'url': f'{HUB.url}/{name}', 'name': name}
        if name in HUB.repos:
            return self.answer(409, {'error': 'You already created this model repo', **answer})
        HUB.create(name, body.get('visibility') == 'private')
        self.answer(200, answer)

    def validate_yaml(self, *, body, **_):
        """What the Hub asks of a model card."""
        content = json.loads(body)['content']
        match = re.match(r'---\n(.*?)\n---\n', content, re.S)
        errors = []
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as e:
            data, errors = {}, [f'not YAML: {e}']
        warnings = [] if data else ['empty or missing yaml metadata in repo card']
        data = data or {}
        for key in ('license', 'library_name', 'pipeline_tag'):
            if key in data and not isinstance(data[key], str):
                errors.append(f'"{key}" must be a string')
        for key in ('datasets', 'metrics', 'tags'):
            if not all(isinstance(value, str) for value in data.get(key, [])):
                errors.append(f'"{key}" must be an array of strings')
        for model in data.get('model-index', []):
            for result in model.get('results', [{}]):
                if not {'task', 'dataset', 'metrics'} <= set(result):
                    errors.append('"model-index" needs task, dataset and metrics')
                elif not {'type', 'name'} <= set(result['dataset']) or not all(
                        {'type', 'value'} <= set(metric) for metric in result['metrics']):
                    errors.append('"model-index" needs a name of the dataset and a type and value of each metric')
        self.answer(400 if errors else 200, {
            'errors': [{'message': text} for text in errors], 'warnings': [{'message': text} for text in warnings]})

    def preupload(self, name, revision, *, body, **_):
        if self.may(name, write=True):
            files = HUB.repos[name]['commits'].get(HUB.resolve(name, revision), {})
            self.answer(200, {'files': [{
                'path': file['path'], 'shouldIgnore': False,
                'uploadMode': 'lfs' if file['path'].endswith(('.safetensors', '.bin')) else 'regular',
                'oid': None if file['path'] not in files else files[file['path']][1]
                if files[file['path']][0] == 'lfs' else git_sha(files[file['path']][1])}
                for file in json.loads(body)['files']]})

    def lfs_batch(self, name, *, body, **_):
        if self.may(name, write=True):
            batch = json.loads(body)
            self.answer(200, {'transfer': 'basic', 'objects': [{
                'oid': item['oid'], 'size': item['size'],
                **({} if item['oid'] in HUB.blobs else {'actions': {
                    'upload': {'href': f'{HUB.cdn_url}/{item["oid"]}'},
                    'verify': {'href': f'{HUB.url}/{name}.git/info/lfs/objects/verify'}}})}
                for item in batch['objects']]}, {'Content-Type': 'application/vnd.git-lfs+json'})

    def lfs_verify(self, name, *, body, **_):
        item = json.loads(body)
        known = HUB.blobs.get(item['oid'])
        self.answer(200 if known is not None and len(known) == item['size'] else 404, {})

    def commit(self, name, revision, *, body, **_):
        if not self.may(name, write=True):
            return
        changes = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'file':
                changes[value['path']] = 'regular', base64.b64decode(value['content'])
            elif item['key'] == 'lfsFile':
                if value['oid'] not in HUB.blobs:
                    return self.error(400, '', f'LFS pointer of {value["path"]} points to nothing')
                changes[value['path']] = 'lfs', value['oid']
            elif item['key'] == 'deletedFile':
                changes[value['path']] = None
        with LOCK:
            sha = HUB.commit(name, revision, changes)
        self.answer(200, {'success': True, 'commitOid': sha, 'commitUrl': f'{HUB.url}/{name}/commit/{sha}',
                          'hookOutput': ''})

    def info(self, name, revision=None, **_):
        if self.may(name):
            sha = HUB.resolve(name, revision or 'main')
            if sha is None:
                return self.error(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
            self.answer(200, {
                '_id': '0', 'id': name, 'modelId': name, 'sha': sha, 'private': HUB.repos[name]['private'], 'tags': [],
                'siblings': [{'rfilename': path} for path in HUB.repos[name]['commits'][sha]]})

    def ref(self, name, kind, ref, *, body, **_):
        if self.may(name, write=True):
            start = HUB.resolve(name, json.loads(body or b'{}').get('startingPoint') or 'main')
            HUB.repos[name]['refs'][ref] = start
            self.answer(200, {})

    def whoami(self, **_):
        self.answer(200, {'type': 'user', 'name': 'USER', 'orgs': []})

    ROUTES = [
        (r'/api/repos/create', create_repo),
        (r'/api/validate-yaml', validate_yaml),
        (r'/api/whoami-v2', whoami),
        (r'/api/models/([^/]+/[^/]+)/preupload/(.+)', preupload),
        (r'/api/models/([^/]+/[^/]+)/commit/(.+)', commit),
        (r'/api/models/([^/]+/[^/]+)/(branch|tag)/(.+)', ref),
        (r'/api/models/([^/]+/[^/]+)/revision/(.+)', info),
        (r'/api/models/([^/]+/[^/]+)', info),
        (r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', lfs_batch),
        (r'/([^/]+/[^/]+)\.git/info/lfs/objects/verify', lfs_verify),
        (r'/api/resolve-cache/models/([^/]+/[^/]+)/([^/]+)/(.+)', resolve),
        (r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', resolve),
    ]

    # for the tests

    def control(self, path, body):
        body = json.loads(body or b'{}')
        with LOCK:
            if path == '/_test/faults':
                HUB.reset()
                HUB.faults = [{'times': 1000, **fault} for fault in body]
                return self.answer(200, {})
            if path == '/_test/log':
                return self.answer(200, HUB.log)
            if path == '/_test/repo':  # files of a new repository, in base64
                changes = {}
                for name, content in body['files'].items():
                    content = base64.b64decode(content)
                    oid = hashlib.sha256(content).hexdigest()
                    lfs = name.endswith(('.safetensors', '.bin'))
                    if lfs:
                        HUB.blobs[oid] = content
                    changes[name] = ('lfs', oid) if lfs else ('regular', content)
                if body['name'] not in HUB.repos:
                    HUB.create(body['name'], body.get('private', False))
                return self.answer(200, {'sha': HUB.commit(body['name'], 'main', changes)})


class Server(ThreadingHTTPServer):
    daemon_threads = True
    is_cdn = False

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away is none of the server's
            super().handle_error(request, client_address)


def main():
    hub, cdn = (Server(('127.0.0.1', 0), Handler) for _ in range(2))
    cdn.is_cdn = True
    HUB.url, HUB.cdn_url = (f'http://127.0.0.1:{server.server_address[1]}' for server in (hub, cdn))
    threading.Thread(target=cdn.serve_forever, daemon=True).start()
    print(HUB.url, flush=True)
    hub.serve_forever()


if __name__ == '__main__':
    main()
