"""A process with the imports of a client of the Hub, which forks a child for every request.

huggingface_hub reads its environment when it is imported, and importing timm takes seconds; a forked child has both
behind it and may change limits, mounts or users for itself. Run as `python hub_client.py SOCKET`.
"""
import ctypes
import json
import os
import resource
import signal
import socket
import socketserver
import sys
import threading

import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.utils._http as http
import timm
import torch

CLONE_NEWNS, MS_REMOUNT, MS_BIND, MS_RDONLY, MS_PRIVATE, MS_REC = 0x20000, 32, 4096, 1, 1 << 18, 16384


def mount(source, target, kind, flags, options=None):
    """mount(2) in a mount namespace of this process; PermissionError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0 or libc.mount(b'none', b'/', None, MS_REC | MS_PRIVATE, None) != 0 or libc.mount(
            source.encode(), target.encode(), kind, flags, options) != 0:
        raise PermissionError(ctypes.get_errno(), 'mounting is not allowed')
    return libc


def full_disk(folder, size):
    mount('tmpfs', folder, b'tmpfs', 0, f'size={size}'.encode())


def read_only(folder):
    libc = mount(folder, folder, None, MS_BIND)
    if libc.mount(b'none', folder.encode(), None, MS_REMOUNT | MS_BIND | MS_RDONLY, None) != 0:
        raise PermissionError(ctypes.get_errno(), 'mounting is not allowed')


def load(name, cache_dir=None, pretrained=True, model_kwargs=(), **_):
    """Create a model; returns what identifies its outputs."""
    model = timm.create_model(name, pretrained=pretrained, cache_dir=cache_dir, **dict(model_kwargs)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(torch.randn(2, model.in_chans, *model.img_size))
    return {'logits': logits.numpy().tobytes().hex(), 'shape': list(logits.shape), 'files': files(cache_dir)}


def push(repo_id, source, **kwargs):
    """timm's own upload."""
    model = timm.create_model(source, pretrained=True)
    info = timm.models.push_to_hf_hub(model, repo_id, **kwargs)
    return {'oid': info.oid}


def validate_card(path, **_):
    """huggingface_hub's validation of a card's metadata."""
    card = huggingface_hub.ModelCard.load(path)
    card.validate()
    return card.data.to_dict()


def files(folder):
    return sorted(os.path.relpath(os.path.join(root, name), folder)
                  for root, _, names in os.walk(folder or '/nonexistent') for name in names)


def run(request):
    waits = []  # before retries, up to 8 s each
    http.time = huggingface_hub.file_download.time = type('time', (), {'sleep': waits.append})
    try:
        prepare(request)
    except PermissionError as e:
        return {'error': 'PermissionError', 'message': str(e), 'causes': [], 'files': [], 'waits': waits}
    answer = call(request)
    if 'full_disk' in request:  # what follows when there is room
        mount('tmpfs', request['arguments']['cache_dir'], b'tmpfs', MS_REMOUNT, b'size=64m')
        answer['next'] = call(request)
    return {**answer, 'waits': waits}


def prepare(request):
    """What a test changes around the call."""
    if 'full_disk' in request:
        full_disk(request['arguments']['cache_dir'], request['full_disk'])
    if 'file_size' in request:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request['file_size'], request['file_size']))
    if request.get('read_only'):
        read_only(request['arguments']['cache_dir'])
    if 'chunk' in request:
        huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = request['chunk']
    if request.get('offline'):
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    if 'endpoint' in request:
        huggingface_hub.constants.ENDPOINT = request['endpoint']
        huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE = \
            request['endpoint'] + '/{repo_id}/resolve/{revision}/{filename}'


def call(request):
    try:
        return globals()[request['call']](**request['arguments'])
    except Exception as e:
        causes = []
        cause = e
        while cause is not None:
            causes.append(f'{type(cause).__name__}: {cause}')
            cause = cause.__cause__
        return {'error': type(e).__name__, 'message': str(e), 'causes': causes,
                'files': files(request['arguments'].get('cache_dir'))}


def request(path, call, arguments, **options):
    """Ask the process at socket `path`; used by the tests."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(json.dumps({'call': call, 'arguments': arguments, **options}).encode() + b'\n')
        connection.shutdown(socket.SHUT_WR)
        return json.loads(b''.join(iter(lambda: connection.recv(1 << 16), b'')))


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        answer = run(json.loads(self.rfile.readline()))
        self.wfile.write(json.dumps(answer).encode())


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    max_children = 8


if __name__ == '__main__':
    torch.set_num_threads(1)  # threads would not survive the forks
    timm.create_model('cct_2_sot_qk')
    with Server(sys.argv[1], Handler) as server:
        # ends with the tests, whatever becomes of them: standard input is theirs
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
        print('ready', flush=True)
        server.serve_forever(poll_interval=0.05)
