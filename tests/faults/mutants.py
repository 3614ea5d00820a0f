"""Damaged variants of files that know the structure of what they damage.

Each function takes a random generator and the bytes of a sound file, and returns (what was done,
other bytes). The same generator gives the same mutant.
"""

import io
import json
import struct
import zipfile
import zlib

HOSTILE = (
  10**9, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, -1e300, None, True, '', 'x', '../../x', '/dev/zero',
  '\u2028\x1b[2J', 'torch.float99', [], {}, [[]], [None], [10**9] * 3, [-1, 0], ['x'], {'x': {}},
  float('nan'), float('inf'), 'os.system', '${HOME}', 'é' * 300, [0] * 1000, '(a+)+$',
)


def _paths(value, at=()):
  """Every place in a JSON value."""
  yield at
  items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
    value, list) else ()
  for key, inner in items:
    yield from _paths(inner, (*at, key))


def _at(value, path):
  for key in path:
    value = value[key]
  return value


def json_value(rng, data):
  """One value replaced, removed, wrapped, renamed or said twice."""
  value = json.loads(data)
  places = [path for path in _paths(value) if path]
  if not places:
    return 'empty', b'null'
  path = rng.choice(places[:400])
  parent, key = _at(value, path[:-1]), path[-1]
  kind = rng.choice(['replace'] * 6 + ['remove', 'wrap', 'rename', 'twice', 'swap'])
  if kind == 'replace':
    parent[key] = rng.choice(HOSTILE)
  elif kind == 'remove':
    del parent[key]
  elif kind == 'wrap':
    parent[key] = rng.choice([[parent[key]], {'x': parent[key]}, str(parent[key])])
  elif kind == 'rename' and isinstance(parent, dict):
    parent[rng.choice(['', 'x', '../x', 'é', 'x' * 5000])] = parent.pop(key)
  elif kind == 'swap':
    other = rng.choice(places[:400])
    parent[key] = _at(json.loads(data), other)
  text = json.dumps(value)
  if kind == 'twice' and text.startswith('{'):
    text = '{' + f'{json.dumps(str(path[0]))}: {json.dumps(rng.choice(HOSTILE))}, ' + text[1:]
  return f'{kind} {"/".join(map(str, path))}', text.encode()


def json_text(rng, data):
  """The text itself damaged: encodings, depth, size of numbers, what is no JSON."""
  deep = rng.choice([90, 500, 10**5])
  texts = {
    'cut': data[: rng.randrange(len(data) + 1)], 'byte order mark': b'\xef\xbb\xbf' + data,
    'utf-16': data.decode().encode('utf-16'), 'deep lists': b'[' * deep + b']' * deep,
    'deep objects': b'{"a":' * deep + b'1' + b'}' * deep, 'list': b'[' + data + b']',
    'digits': b'{"a": ' + b'9' * 10**5 + b'}', 'surrogate': b'{"\\ud800": "\\udfff"}',
    'not utf-8': data.replace(b'"', b'\xff', 1), 'trailing': data + b'}', 'null': b'null',
    'number': b'1e999', 'nul': data + b'\0', 'empty': b'', 'text': b'"x"', 'object': b'{}',
  }
  name = rng.choice(sorted(texts))
  return name, texts[name]


def any_json(rng, data):
  """One or the other."""
  return (json_value if rng.random() < 0.8 else json_text)(rng, data)


def any_bytes(rng, data):
  """Bits flipped, parts cut, repeated, zeroed, exchanged: for any file."""
  data = bytearray(data)
  at = rng.randrange(len(data) or 1)
  size = rng.choice([1, 4, 64, 1000])
  kind = rng.choice(['flip', 'cut', 'repeat', 'zero', 'ones', 'remove', 'noise', 'empty'])
  if kind == 'flip':
    for _ in range(rng.choice([1, 3, 20])):
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  elif kind == 'cut':
    del data[at:]
  elif kind == 'repeat':
    data[at:at] = data[at : at + size]
  elif kind in ('zero', 'ones', 'noise'):
    part = {'zero': bytes(size), 'ones': b'\xff' * size, 'noise': rng.randbytes(size)}[kind]
    data[at : at + size] = part
  elif kind == 'remove':
    del data[at : at + size]
  else:
    data = bytearray()
  return f'{kind} {size} at {at}', bytes(data)


def safetensors(rng, data):
  """Header, offsets, types, shapes, metadata and names of a safetensors file."""
  length = struct.unpack('<Q', data[:8])[0]
  header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
  name = rng.choice([key for key in header if key != '__metadata__'])
  entry = header[name]
  kind = rng.choice(['dtype', 'shape', 'offsets', 'length', 'json', 'name', 'metadata', 'body',
                     'bytes', 'values'])
  if kind == 'dtype':
    entry['dtype'] = rng.choice(
      ['F32', 'F64', 'BF16', 'F8_E4M3', 'I64', 'BOOL', 'U8', 'F4', 'x', 5])
  elif kind == 'shape':
    entry['shape'] = rng.choice([[], [0], [-1], [2**62, 2**62], [10**18, 0], [1.5], ['x'], None, 7,
                                 entry['shape'][::-1], [*entry['shape'], 1], [10**30]])
  elif kind == 'offsets':
    start, end = entry['data_offsets']
    entry['data_offsets'] = rng.choice([
      [end, start], [0, 0], [start, end + 4], [-4, end], [2**63] * 2, [start], [start, 'x'], None,
      [start + 1, end + 1]])
  elif kind == 'name':
    header[rng.choice(['', 'x', name + '.x', '../x', 'é\u2028', 'x' * 9999])] = header.pop(name)
  elif kind == 'metadata':
    header['__metadata__'] = rng.choice([[], 'x', {'x': 1}, {'x': None}, {'x': 'y' * 10**5}, None])
  elif kind == 'body':
    body = rng.choice([b'', body[:-1], body + b'x', body * 2])
  elif kind == 'values':  # NaN, infinity and the like, in a sound file.
    at = 4 * rng.randrange(len(body) // 4)
    body = body[:at] + rng.choice([b'\0\0\xc0\x7f', b'\0\0\x80\x7f', b'\xff' * 4]) + body[at + 4 :]
  text = json.dumps(header).encode()
  if kind == 'json':
    text = any_json(rng, text)[1]
  size = len(text)
  if kind == 'length':
    size = rng.choice([0, 1, size - 1, size + 1, 2**24, 2**40, 2**63, 2**64 - 1])
  data = struct.pack('<Q', size) + text + body
  return f'{kind} of {name}', any_bytes(rng, data)[1] if kind == 'bytes' else data


def zip_file(rng, data):
  """A field of a zip archive's directory, of a local header or of the end, or another member."""
  data = bytearray(data)
  kind = rng.choice(['directory', 'local', 'end', 'member', 'bytes'])
  if kind == 'member':
    return _zip_member(rng, bytes(data))
  if kind == 'bytes':
    return any_bytes(rng, bytes(data))
  mark, fields = {
    'directory': (b'PK\1\2', {'flags': (8, 2), 'method': (10, 2), 'crc': (16, 4), 'packed': (20, 4),
                              'size': (24, 4), 'name': (28, 2), 'extra': (30, 2),
                              'offset': (42, 4)}),
    'local': (b'PK\3\4', {'flags': (6, 2), 'method': (8, 2), 'packed': (18, 4), 'size': (22, 4),
                          'name': (26, 2), 'extra': (28, 2)}),
    'end': (b'PK\5\6', {'disk': (4, 2), 'entries': (10, 2), 'size': (12, 4), 'offset': (16, 4),
                        'comment': (20, 2)}),
  }[kind]
  places = [i for i in range(len(data)) if data[i : i + 4] == mark]
  at, field = rng.choice(places), rng.choice(sorted(fields))
  start, width = fields[field]
  new = rng.choice([0, 1, 8, 12, 99, 2**(8 * width) - 1, 2**(8 * width - 1), rng.getrandbits(8)])
  data[at + start : at + start + width] = new.to_bytes(width, 'little')
  return f'{field} of {kind} at {at} is {new}', bytes(data)


def _zip_member(rng, data):
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  name = rng.choice(sorted(members))
  packed = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
  kind = rng.choice(['remove', 'rename', 'damage', 'inflate', 'twice', 'npy'])
  if kind == 'remove':
    del members[name]
  elif kind == 'rename':
    members[rng.choice(['x', '../x', name + '/x', name.upper()])] = members.pop(name)
  elif kind == 'inflate':
    members[name] += bytes(10**6)
  elif kind == 'npy' and members[name].startswith(b'\x93NUMPY'):
    kind, members[name] = npy(rng, members[name])
  elif kind != 'twice':
    members[name] = any_bytes(rng, members[name])[1]
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', packed) as archive:
    for key, value in [*members.items(), *([(name, b'x')] if kind == 'twice' else [])]:
      archive.writestr(key, value)
  return f'{kind} of member {name}', out.getvalue()


def npy(rng, data):
  """The header of an array."""
  size = struct.unpack('<H', data[8:10])[0]
  text, body = data[10 : 10 + size].decode(), data[10 + size :]
  header = {'descr': '<f8', 'fortran_order': False, 'shape': (3,)} | eval_header(text)
  key = rng.choice(['descr', 'shape', 'fortran_order', 'text', 'version'])
  if key == 'descr':
    header['descr'] = rng.choice(
      ['|O', '<f2', '<c16', '<U5', '|V8', 'x', '<f999', [('a', '|O')], 5])
  elif key == 'shape':
    header['shape'] = rng.choice([
      (), (0,), (-1,), (10**9, 10**9), (2**63,), 'x', (1.5,), (0, 10**30), header['shape'][::-1],
      (True,)])
  elif key == 'fortran_order':
    header['fortran_order'] = rng.choice([True, 1, None, 'x'])
  text = repr(header)
  if key == 'text':
    text = rng.choice(
      ['(' * 5000, '{', 'print(1)', '{}', "{'descr': '<f8'}", ' ' * 9000, text[:-5]])
  version = rng.choice([b'\1\0', b'\2\0', b'\3\0', b'\xff\xff']) if key == 'version' else b'\1\0'
  encoded = text.encode() + b'\n'
  start = b'\x93NUMPY' + version + struct.pack('<H', len(encoded))
  return f'{key} of the array', start + encoded + body


def eval_header(text):
  """The dictionary of an array's header, which is a literal."""
  import ast

  return ast.literal_eval(text)


def tar_file(rng, data):
  """A field of a member's header, with a checksum that fits it."""
  data = bytearray(data)
  if rng.random() < 0.3:
    return any_bytes(rng, bytes(data))
  places = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b'ustar']
  at = rng.choice(places)
  field, start, width = rng.choice([
    ('name', 0, 100), ('size', 124, 12), ('type', 156, 1), ('link', 157, 100), ('magic', 257, 8),
    ('prefix', 345, 155), ('checksum', 148, 8), ('mtime', 136, 12),
  ])
  if field == 'type':
    new = bytes([rng.choice(b'0123456789LKSxgXDM\0z')])
  elif field == 'size':
    new = rng.choice([b'77777777777\0', b'-0000000001\0', b'\xff' * 12, b'x' * 12, bytes(12),
                      b'\x80' + bytes(3) + b'\x7f' * 8, b'00000000001\0'])
  else:
    new = rng.choice([bytes(width), b'\xff' * width, b'../' * 40, rng.randbytes(width)])
  data[at + start : at + start + width] = new[:width].ljust(width, b'\0')
  if field != 'checksum':
    data[at + 148 : at + 156] = b' ' * 8
    data[at + 148 : at + 156] = b'%06o\0 ' % sum(data[at : at + 512])
  return f'{field} at {at} is {bytes(new[:12])!r}', bytes(data)


def png(rng, data):
  """Chunks edited, dropped, repeated, exchanged and added, mostly with checksums that fit."""
  chunks, at = [], 8
  while at < len(data):
    size = struct.unpack('>I', data[at : at + 4])[0]
    chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + size]])
    at += 12 + size
  i = rng.randrange(len(chunks))
  kind = rng.choice(['bytes', 'drop', 'repeat', 'swap', 'add', 'edit', 'header', 'length', 'sum'])
  if kind == 'bytes':
    return any_bytes(rng, data)
  if kind == 'drop':
    del chunks[i]
  elif kind == 'repeat':
    chunks.insert(i, chunks[i])
  elif kind == 'swap':
    j = rng.randrange(len(chunks))
    chunks[i], chunks[j] = chunks[j], chunks[i]
  elif kind == 'add':
    bomb = zlib.compress(bytes(10**7))
    chunks.insert(rng.randrange(1, len(chunks) + 1), list(rng.choice([
      (b'tEXt', b'a\0' + b'x' * 10**6), (b'zTXt', b'a\0\0' + bomb), (b'iCCP', b'a\0\0' + bomb),
      (b'iTXt', b'a\0\1\0\0\0' + bomb), (b'eXIf', b'II*\0' + rng.randbytes(64)),
      (b'tRNS', b'\0' * 9), (b'PLTE', b'\0' * 7), (b'IDAT', bomb), (b'acTL', bytes(8)),
      (b'fcTL', rng.randbytes(26)),
      (b'\0\0\0\0', b''), (b'gAMA', b''), (b'IEND', b'x'), (b'pHYs', b'x'),
    ])))
  elif kind == 'edit':
    chunks[i][1] = any_bytes(rng, chunks[i][1] or b'x')[1]
  elif kind == 'header':
    header = bytearray(chunks[0][1])
    place, new = rng.choice([(0, 0), (0, 2**31), (4, 2**32 - 1), (0, 10**5), (4, 10**4)] + [
      (field, rng.randrange(256) << 24) for field in range(8, 13)
    ])
    width = min(4, 13 - place) if place < 8 else 1
    header[place : place + width] = struct.pack('>I', new)[:width]
    chunks[0][1] = bytes(header)
  out = data[:8]
  for n, (name, body) in enumerate(chunks):
    size = len(body)
    if kind == 'length' and n == i:
      size = rng.choice([0, 2**31, 2**32 - 1, len(body) + 1])
    checksum = zlib.crc32(name + body) ^ (kind == 'sum' and n == i)
    out += struct.pack('>I', size) + name + body + struct.pack('>I', checksum)
  return f'{kind} of chunk {i}', out


def jpeg(rng, data):
  """Segments edited, dropped, repeated and added, EXIF data above all."""
  segments, at = [], 2
  while data[at + 1] != 0xDA:  # From the start of the scan on it is not in segments.
    size = struct.unpack('>H', data[at + 2 : at + 4])[0]
    segments.append([data[at + 1], data[at + 4 : at + 2 + size]])
    at += 2 + size
  scan = data[at:]
  i = rng.randrange(len(segments))
  kind = rng.choice(['bytes', 'drop', 'repeat', 'edit', 'exif', 'exif', 'size', 'add', 'length'])
  if kind == 'bytes':
    return any_bytes(rng, data)
  if kind == 'drop':
    del segments[i]
  elif kind == 'repeat':
    segments.insert(i, segments[i])
  elif kind == 'edit':
    segments[i][1] = any_bytes(rng, segments[i][1] or b'x')[1]
  elif kind == 'exif':
    segments.insert(0, [0xE1, b'Exif\0\0' + exif(rng)])
  elif kind == 'size':
    frame = next(s for s in segments if s[0] in (0xC0, 0xC2))
    body = bytearray(frame[1])
    at = rng.choice([0, 1, 3, 5, 6, 7])
    body[at : at + 2] = rng.choice([b'\0\0', b'\xff\xff', b'\0\1', rng.randbytes(2)])
    frame[1] = bytes(body)
  elif kind == 'add':
    marker = rng.choice([0xC4, 0xDB, 0xDD, 0xE0, 0xE2, 0xED, 0xEE, 0xFE, 0xC0, 0xD8, 0xD9, 0x01])
    place = rng.randrange(len(segments) + 1)
    segments.insert(place, [marker, rng.randbytes(rng.choice([0, 9, 99]))])
  out = data[:2]
  for n, (marker, body) in enumerate(segments):
    size = len(body) + 2
    if kind == 'length' and n == i:
      size = rng.choice([0, 1, 2, size - 1, size + 1, 65535])
    out += bytes([0xFF, marker]) + struct.pack('>H', size & 0xFFFF) + body
  return f'{kind} of segment {i}', out + scan


def exif(rng):
  """A directory of EXIF with an orientation of any type, and places that lead anywhere."""
  order = rng.choice(['<', '>'])
  count = rng.choice([0, 1, 2, 9, 65535])
  out = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(
    f'{order}IH', rng.choice([8, 0, 4, 2**32 - 1]), count)
  for _ in range(min(count, 9)):
    tag = rng.choice([0x0112, 0x0112, 0x8769, 0x8825, 0x010E, 0xA005, rng.getrandbits(16)])
    out += struct.pack(f'{order}HHI', tag, rng.choice([1, 2, 3, 4, 5, 7, 12, 99]),
                       rng.choice([0, 1, 2, 10**6, 2**32 - 1])) + rng.randbytes(4)
  return out + rng.randbytes(rng.choice([0, 4, 30]))


def text_lines(rng, data):
  """Rows of a list of captions: jsonl, csv or plain text."""
  lines = data.split(b'\n')
  i = rng.randrange(len(lines))
  kind = rng.choice(['bytes', 'line', 'long', 'quotes', 'encoding', 'nul', 'order'])
  if kind == 'bytes':
    return any_bytes(rng, data)
  if kind == 'line':
    lines[i] = rng.choice([b'', b'{}', b'[]', b'null', b'{"file_name": 5}', b'"' * 9, b'a,b,c,d,e',
                           b'{"file_name": "../../etc/passwd", "text": "x"}', b'\xff\xfe',
                           b'[' * 9999, b'{"file_name": "a.png", "text": {"a": []}}', b'9' * 9999])
  elif kind == 'long':
    lines[i] = lines[i] * 2000
  elif kind == 'quotes':
    lines[i] = lines[i].replace(b'"', rng.choice([b"'", b'""', b'\\', b'']))
  elif kind == 'encoding':
    return 'utf-16', data.decode().encode('utf-16')
  elif kind == 'nul':
    lines[i] = lines[i] + b'\0'
  else:
    rng.shuffle(lines)
  return f'{kind} of line {i}', b'\n'.join(lines)


