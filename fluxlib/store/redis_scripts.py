"""The atomic steps of the Redis store, in Lua. Each may run twice with the same effect as once.

Keys, all behind one prefix (P):

    functions, agents, notes         tables, each a hash: key → text
    TABLE:revisions, TABLE:revision  hash: key → its revision; counts changes
    TABLE:code                       hash: key → digest of the blob it refers to (functions alone refer to some)
    archive:DIGEST                   list: the blob in pieces
    archive:DIGEST:users             set of the keys that refer to it
    lease:NAME                       hash: owner, token, expires (by Redis's clock); leases: names by when they run out
    tokens                           the last fencing token given
    execution:ID                     hash; its request in request:ID, so that nobody reads it with the rest
    executions, …:f:F, …:s:S, …:fs:F:S   IDs by order of acceptance: all, by function, by status, by both
    queued, queued:f:F               the queued ones among them
    ready:f:F                        those of them that nobody owns, by rank
    queues, queues:ready, queues:bytes   hash: function → how many are queued, ready, bytes of their requests
    open:agent:A, open:owner:O       what has not ended
    expiring                         ended ones by when they are to be forgotten (by Redis's clock)
    idempotent:F:KEY                 the execution that a key stands for
"""

from __future__ import annotations

from fluxlib.store.redis_link import Script

# Whether a leader's write comes too late: the token is that of an earlier holder.
_FENCE = """
local function too_late(P, name, token)
  return name ~= '' and redis.call('HGET', P..'lease:'..name, 'token') ~= token
end
"""
_INDEX = """
local function list(P, fn, status, seq, id)
  redis.call('ZADD', P..'executions:s:'..status, seq, id)
  redis.call('ZADD', P..'executions:fs:'..fn..':'..status, seq, id)
end
local function unlist(P, fn, status, id)
  redis.call('ZREM', P..'executions:s:'..status, id)
  redis.call('ZREM', P..'executions:fs:'..fn..':'..status, id)
end
local function count(P, hash, fn, by)
  if by ~= 0 and redis.call('HINCRBY', P..hash, fn, by) == 0 then redis.call('HDEL', P..hash, fn) end
end
local FIELDS = {'function', 'status', 'phase', 'agent', 'owner', 'seq', 'rank', 'size', 'attempt', 'async'}
-- What the indexes are made of; nil for an execution that is unknown or has ended.
local function open_entry(P, id)
  local v = redis.call('HMGET', P..'execution:'..id, unpack(FIELDS))
  if v[2] ~= 'running' then return nil end
  return {id = id, fn = v[1], phase = v[3], agent = v[4], owner = v[5], seq = v[6], rank = v[7] or v[6],
    size = tonumber(v[8] or '0'), attempt = v[9] or '1', async = v[10]}
end
local function place(P, e)
  redis.call('ZADD', P..'open:agent:'..e.agent, e.seq, e.id)
  redis.call('ZADD', P..'open:owner:'..e.owner, e.seq, e.id)
  if e.phase == 'queued' then
    redis.call('ZADD', P..'queued', e.seq, e.id)
    redis.call('ZADD', P..'queued:f:'..e.fn, e.seq, e.id)
    count(P, 'queues', e.fn, 1)
    count(P, 'queues:bytes', e.fn, e.size)
    if e.owner == '' then
      redis.call('ZADD', P..'ready:f:'..e.fn, e.rank, e.id)
      count(P, 'queues:ready', e.fn, 1)
    end
  end
end
local function displace(P, e)
  redis.call('ZREM', P..'open:agent:'..e.agent, e.id)
  redis.call('ZREM', P..'open:owner:'..e.owner, e.id)
  if e.phase == 'queued' then
    redis.call('ZREM', P..'queued', e.id)
    redis.call('ZREM', P..'queued:f:'..e.fn, e.id)
    count(P, 'queues', e.fn, -1)
    count(P, 'queues:bytes', e.fn, -e.size)
    if e.owner == '' then
      redis.call('ZREM', P..'ready:f:'..e.fn, e.id)
      count(P, 'queues:ready', e.fn, -1)
    end
  end
end
local function move(P, e, agent, phase, owner)
  displace(P, e)
  e.agent, e.phase, e.owner = agent, phase, owner
  redis.call('HSET', P..'execution:'..e.id, 'agent', agent, 'phase', phase, 'owner', owner)
  place(P, e)
end
"""
_READ = """
local function read(P, id)
  return redis.call('HMGET', P..'execution:'..id, 'id', 'seq', 'function', 'agent', 'status', 'phase', 'async',
    'started', 'owner', 'key', 'keep', 'rank', 'size', 'attempt', 'record')
end
"""
# Of this server alone: the clocks of two Flux may be hours apart.
_NOW = """
local function clock()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1e6
end
"""

# P, key, number of the piece, piece, seconds to live → how many pieces there are
UPLOAD = Script.of(
    """
local P, key, number, piece, life = unpack(ARGV)
if redis.call('LLEN', key) == tonumber(number) then redis.call('RPUSH', key, piece) end
redis.call('EXPIRE', key, life)
return redis.call('LLEN', key)
"""
)
_KV = """
local function drop_blob(P, digest, key)
  if digest == '' then return end
  redis.call('SREM', P..'archive:'..digest..':users', key)
  if redis.call('SCARD', P..'archive:'..digest..':users') == 0 then redis.call('DEL', P..'archive:'..digest) end
end
local function revision_of(P, tab, key)
  if redis.call('HEXISTS', P..tab, key) == 0 then return '0' end
  return redis.call('HGET', P..tab..':revisions', key) or '1'
end
"""
# P, table, key, text, what the revision must be ('': any; 'known': any but 0), digest of the blob, key of its uploaded
# pieces or '', lease, token -> 'late', 0 when the revision is another, 1
PUT = Script.of(
    _FENCE,
    _KV,
    """
local P, tab, key, text, revision, digest, upload, lease, token = unpack(ARGV)
if too_late(P, lease, token) then return 'late' end
local former = revision_of(P, tab, key)
if revision == 'known' then
  if former == '0' then return 0 end
elseif revision ~= '' and revision ~= former then
  -- What this would write is there: an earlier run of this script, whose answer was lost, has written it.
  return redis.call('HGET', P..tab, key) == text and 1 or 0
end
if revision ~= 'known' then
  local former_digest = redis.call('HGET', P..tab..':code', key) or ''
  if former_digest ~= digest then drop_blob(P, former_digest, key) end
  if upload ~= '' and redis.call('EXISTS', upload) == 1 then
    redis.call('PERSIST', upload)
    redis.call('RENAME', upload, P..'archive:'..digest)
  end
  if digest ~= '' then
    redis.call('SADD', P..'archive:'..digest..':users', key)
    redis.call('HSET', P..tab..':code', key, digest)
  else
    redis.call('HDEL', P..tab..':code', key)
  end
end
redis.call('HSET', P..tab, key, text)
redis.call('HSET', P..tab..':revisions', key, redis.call('INCR', P..tab..':revision'))
return 1
""",
)
# P, table, key, lease, token -> 'late', or how many went
DELETE = Script.of(
    _FENCE,
    _KV,
    """
local P, tab, key, lease, token = unpack(ARGV)
if too_late(P, lease, token) then return 'late' end
drop_blob(P, redis.call('HGET', P..tab..':code', key) or '', key)
redis.call('HDEL', P..tab..':code', key)
redis.call('HDEL', P..tab..':revisions', key)
local found = redis.call('HDEL', P..tab, key)
if found == 1 then redis.call('INCR', P..tab..':revision') end
return found
""",
)

# P, id, function, agent, phase, async, started, owner, idempotency key, attempt, rank or '', has request, request
# → the ID it is known under
CREATE = Script.of(
    _INDEX,
    """
local P, id, fn, agent, phase, async, started, owner, key, attempt, rank, has_request, request = unpack(ARGV)
if key ~= '' then
  local known = redis.call('GET', P..'idempotent:'..fn..':'..key)
  if known then return known end
end
local h = P..'execution:'..id
if redis.call('EXISTS', h) == 1 then return id end
if key ~= '' then redis.call('SET', P..'idempotent:'..fn..':'..key, id) end
local seq = redis.call('INCR', P..'sequence')
if rank == '' then rank = seq end
local size = 0
if has_request == '1' then
  size = #request
  redis.call('SET', P..'request:'..id, request)
end
redis.call('HSET', h, 'id', id, 'seq', seq, 'function', fn, 'agent', agent, 'status', 'running', 'phase', phase,
  'async', async, 'started', started, 'owner', owner, 'key', key, 'attempt', attempt, 'rank', rank, 'size', size)
redis.call('ZADD', P..'executions', seq, id)
redis.call('ZADD', P..'executions:f:'..fn, seq, id)
list(P, fn, 'running', seq, id)
place(P, {id = id, fn = fn, phase = phase, agent = agent, owner = owner, seq = seq, rank = rank, size = size})
return id
""",
)
# P, id… → counts these queued ones, as their steps do from then on; none: begins at nothing
COUNT_QUEUED = Script.of(
    _INDEX,
    """
local P = ARGV[1]
if #ARGV == 1 then
  redis.call('DEL', P..'queues', P..'queues:bytes', P..'queues:ready')
  return
end
for i = 2, #ARGV do
  local e = open_entry(P, ARGV[i])
  if e and e.phase == 'queued' then
    count(P, 'queues', e.fn, 1)
    count(P, 'queues:bytes', e.fn, e.size)
  end
end
""",
)
# P, owner, function, how many, largest request to bring → their fields, the request last (false for a larger one)
CLAIM = Script.of(
    _INDEX,
    _READ,
    """
local P, owner, fn, limit, small = unpack(ARGV)
local found = {}
for i, id in ipairs(redis.call('ZRANGE', P..'ready:f:'..fn, 0, limit - 1)) do
  local e = open_entry(P, id)
  move(P, e, '', 'queued', owner)
  local fields = read(P, id)
  fields[#fields + 1] = e.size > 0 and e.size <= tonumber(small) and redis.call('GET', P..'request:'..id) or false
  found[i] = fields
end
return found
""",
)
# P, id, attempt (0: any), owner, agent, phase, next owner → 0 when it has ended, is another's or at another attempt
MOVE = Script.of(
    _INDEX,
    """
local P, id, attempt, owner, agent, phase, next_owner = unpack(ARGV)
local e = open_entry(P, id)
if not e or (attempt ~= '0' and attempt ~= e.attempt) then return 0 end
-- Where it is to go: an earlier run of this script, whose answer was lost, has brought it there.
if e.agent == agent and e.phase == phase and e.owner == next_owner then return 1 end
if e.owner ~= owner then return 0 end
move(P, e, agent, phase, next_owner)
return 1
""",
)
# P, id, attempt (0: any), status, agent, seconds to keep it, JSON, keeps its request → 1 when this end was written
END = Script.of(
    _INDEX,
    _NOW,
    """
local P, id, attempt, status, agent, keep_for, record, keeps = unpack(ARGV)
local e = open_entry(P, id)
if not e or (attempt ~= '0' and attempt ~= e.attempt) then return 0 end
local keep = string.format('%.6f', clock() + tonumber(keep_for))
displace(P, e)
unlist(P, e.fn, 'running', id)
list(P, e.fn, status, e.seq, id)
if keeps == '0' then
  redis.call('DEL', P..'request:'..id)
  e.size = 0
end
redis.call('HSET', P..'execution:'..id, 'status', status, 'phase', 'ended', 'agent', agent, 'keep', keep,
  'record', record, 'size', e.size)
redis.call('ZADD', P..'expiring', keep, id)
return 1
""",
    spare=True,
)
# P, index, highest score, how many → their fields
PAGE = Script.of(
    _READ,
    """
local P, index, highest, limit = unpack(ARGV)
local found = {}
for i, id in ipairs(redis.call('ZREVRANGEBYSCORE', P..index, highest, '-inf', 'LIMIT', 0, limit)) do
  found[i] = read(P, id)
end
return found
""",
)
# P, index of open ones, the score they are above, how many → their fields
OPEN = Script.of(
    _READ,
    """
local P, index, after, limit = unpack(ARGV)
local found = {}
local ids = redis.call('ZRANGEBYSCORE', P..index, '('..after, '+inf', 'LIMIT', 0, limit)
for i, id in ipairs(ids) do found[i] = read(P, id) end
return found
""",
)
# P, dead owner, owner, lease, token → 'late' or how many
ADOPT = Script.of(
    _FENCE,
    _INDEX,
    """
local P, dead, owner, lease, token = unpack(ARGV)
if too_late(P, lease, token) then return 'late' end
local ids = redis.call('ZRANGE', P..'open:owner:'..dead, 0, -1)
if dead == owner then return #ids end
for _, id in ipairs(ids) do
  local e = open_entry(P, id)
  local waits = e.phase == 'queued' and e.async == '1'
  move(P, e, e.agent, e.phase, waits and '' or owner)
end
return #ids
""",
    spare=True,
)
_FORGET = """
local function forget(P, id)
  local h = P..'execution:'..id
  local e = open_entry(P, id)
  local v = redis.call('HMGET', h, 'function', 'status', 'key')
  redis.call('ZREM', P..'expiring', id)
  if not v[1] then return end
  if e then displace(P, e) end
  redis.call('ZREM', P..'executions', id)
  redis.call('ZREM', P..'executions:f:'..v[1], id)
  unlist(P, v[1], v[2], id)
  if v[3] ~= '' then redis.call('DEL', P..'idempotent:'..v[1]..':'..v[3]) end
  redis.call('DEL', h, P..'request:'..id)
end
"""
# P, id, owner
FORGET = Script.of(
    _INDEX,
    _FORGET,
    """
local P, id, owner = unpack(ARGV)
if redis.call('HGET', P..'execution:'..id, 'owner') == owner then forget(P, id) end
""",
    spare=True,
)
# P, how many records to keep (0: any number), how many at most → how many
EXPIRE = Script.of(
    _INDEX,
    _FORGET,
    _NOW,
    """
local P, max_records, limit = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local gone = 0
local function forget_all(ids)
  for _, id in ipairs(ids) do forget(P, id) end
  gone = gone + #ids
end
local now = string.format('%.6f', clock())
forget_all(redis.call('ZRANGEBYSCORE', P..'expiring', '-inf', now, 'LIMIT', 0, limit))
if max_records == 0 then return gone end
for _, index in ipairs({'executions:s:success', 'expiring'}) do
  local surplus = math.min(limit - gone, redis.call('ZCARD', P..'expiring') - max_records)
  if surplus > 0 then forget_all(redis.call('ZRANGE', P..index, 0, surplus - 1)) end
end
return gone
""",
    spare=True,
)

# P, name, owner, seconds → the token, or false when another holds it.
# Names of dead processes are dropped after a day, once nothing is left for anybody to adopt.
ACQUIRE = Script.of(
    _NOW,
    """
local P, name, owner, seconds = unpack(ARGV)
local now = clock()
local expires = string.format('%.6f', now + tonumber(seconds))
local h = P..'lease:'..name
local l = redis.call('HMGET', h, 'owner', 'token', 'expires')
local live = l[1] and tonumber(l[3]) > now
if live and l[1] ~= owner then return false end
local token = live and l[2] or string.format('%d', redis.call('INCR', P..'tokens'))
redis.call('HSET', h, 'owner', owner, 'token', token, 'expires', expires)
redis.call('ZADD', P..'leases', expires, name)
if not live then
  for _, old in ipairs(redis.call('ZRANGEBYSCORE', P..'leases', '-inf', now - 86400, 'LIMIT', 0, 100)) do
    local whose = redis.call('HGET', P..'lease:'..old, 'owner') or ''
    if redis.call('ZCARD', P..'open:owner:'..whose) == 0 then
      redis.call('ZREM', P..'leases', old)
      redis.call('DEL', P..'lease:'..old)
    end
  end
end
return token
""",
    spare=True,
)
# P, name… → owner, token and seconds left of each, in their order; false for one that is not there
LEASES = Script.of(
    _NOW,
    """
local P, now, found = ARGV[1], clock(), {}
for i = 2, #ARGV do
  local l = redis.call('HMGET', P..'lease:'..ARGV[i], 'owner', 'token', 'expires')
  found[i - 1] = l[1] and {l[1], l[2], string.format('%.6f', tonumber(l[3]) - now)}
end
return found
""",
)
# What belongs together is read by a script: a transaction is refused while the server's memory is full, reads as well.
# P, table, key → its text and its revision
VALUE = Script.of(
    "local P, tab, key = unpack(ARGV)\n"
    "return {redis.call('HGET', P..tab, key), redis.call('HGET', P..tab..':revisions', key)}"
)
# P, name of a hash… → the fields and values of each, flat
HASHES = Script.of(
    """
local P, found = ARGV[1], {}
for i = 2, #ARGV do found[i - 1] = redis.call('HGETALL', P..ARGV[i]) end
return found
"""
)
# P, name, token
RELEASE = Script.of(
    """
local P, name, token = unpack(ARGV)
if redis.call('HGET', P..'lease:'..name, 'token') == token then
  redis.call('HSET', P..'lease:'..name, 'expires', '0')
end
""",
    spare=True,
)
# P: fails where a write would
PING = Script.of("redis.call('SET', ARGV[1]..'ping', '1', 'EX', 60)")

ALL = (
    UPLOAD,
    PUT,
    DELETE,
    COUNT_QUEUED,
    CREATE,
    CLAIM,
    MOVE,
    END,
    PAGE,
    OPEN,
    ADOPT,
    FORGET,
    EXPIRE,
    ACQUIRE,
    LEASES,
    VALUE,
    HASHES,
    RELEASE,
    PING,
)
