"""The atomic steps of the Redis store, in Lua. Each may run twice with the same effect as once.

Keys, all behind one prefix (P):

    functions, functions:code        hash: name → JSON, name → digest of its archive
    functions:revision               counts changes
    archive:DIGEST                   list: the zip in pieces
    archive:DIGEST:users             set of the functions whose code it is
    agents, facts                    hash
    lease:NAME                       hash: owner, token, expires (by Redis's clock); leases: names by when they run out
    tokens                           the last fencing token given
    execution:ID                     hash
    executions, …:f:F, …:s:S, …:fs:F:S   IDs by order of acceptance: all, by function, by status, by both
    queued, queued:f:F               the queued ones among them
    open:agent:A, open:owner:O       what has not ended
    expiring                         ended ones by when they are to be forgotten
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
local function place(P, fn, phase, agent, owner, seq, id)
  redis.call('ZADD', P..'open:agent:'..agent, seq, id)
  redis.call('ZADD', P..'open:owner:'..owner, seq, id)
  if phase == 'queued' then
    redis.call('ZADD', P..'queued', seq, id)
    redis.call('ZADD', P..'queued:f:'..fn, seq, id)
  end
end
local function displace(P, fn, phase, agent, owner, id)
  redis.call('ZREM', P..'open:agent:'..agent, id)
  redis.call('ZREM', P..'open:owner:'..owner, id)
  if phase == 'queued' then
    redis.call('ZREM', P..'queued', id)
    redis.call('ZREM', P..'queued:f:'..fn, id)
  end
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
# P, name, JSON, digest, key of the uploaded pieces or ''
SAVE_FUNCTION = Script.of(
    """
local P, name, text, digest, upload = unpack(ARGV)
local former = redis.call('HGET', P..'functions:code', name) or ''
if former ~= digest and former ~= '' then
  redis.call('SREM', P..'archive:'..former..':users', name)
  if redis.call('SCARD', P..'archive:'..former..':users') == 0 then redis.call('DEL', P..'archive:'..former) end
end
if upload ~= '' and redis.call('EXISTS', upload) == 1 then
  redis.call('PERSIST', upload)
  redis.call('RENAME', upload, P..'archive:'..digest)
end
if digest ~= '' then redis.call('SADD', P..'archive:'..digest..':users', name) end
redis.call('HSET', P..'functions:code', name, digest)
redis.call('HSET', P..'functions', name, text)
redis.call('INCR', P..'functions:revision')
"""
)
# P, name → 1 when there was one
DELETE_FUNCTION = Script.of(
    """
local P, name = unpack(ARGV)
local former = redis.call('HGET', P..'functions:code', name) or ''
if former ~= '' then
  redis.call('SREM', P..'archive:'..former..':users', name)
  if redis.call('SCARD', P..'archive:'..former..':users') == 0 then redis.call('DEL', P..'archive:'..former) end
end
redis.call('HDEL', P..'functions:code', name)
local found = redis.call('HDEL', P..'functions', name)
if found == 1 then redis.call('INCR', P..'functions:revision') end
return found
"""
)

# P, hash, field, value, lease, token → 'late' or how many fields are new
SET_FIELD = Script.of(
    _FENCE,
    """
local P, hash, field, value, lease, token = unpack(ARGV)
if too_late(P, lease, token) then return 'late' end
return redis.call('HSET', P..hash, field, value)
""",
)
# P, hash, field, value, lease, token → 'late', or whether there was such a field to write
UPDATE_FIELD = Script.of(
    _FENCE,
    """
local P, hash, field, value, lease, token = unpack(ARGV)
if too_late(P, lease, token) then return 'late' end
if redis.call('HEXISTS', P..hash, field) == 0 then return 0 end
redis.call('HSET', P..hash, field, value)
return 1
""",
)
# P, hash, field, lease, token → 'late' or how many fields went
DELETE_FIELD = Script.of(
    _FENCE,
    """
local P, hash, field, lease, token = unpack(ARGV)
if too_late(P, lease, token) then return 'late' end
return redis.call('HDEL', P..hash, field)
""",
)

# P, id, function, agent, phase, async, started, owner, idempotency key, has request, request → the ID it is known under
CREATE = Script.of(
    _INDEX,
    """
local P, id, fn, agent, phase, async, started, owner, key, has_request, request = unpack(ARGV)
if key ~= '' then
  local known = redis.call('GET', P..'idempotent:'..fn..':'..key)
  if known then return known end
end
local h = P..'execution:'..id
if redis.call('EXISTS', h) == 1 then return id end
if key ~= '' then redis.call('SET', P..'idempotent:'..fn..':'..key, id) end
local seq = redis.call('INCR', P..'sequence')
redis.call('HSET', h, 'id', id, 'seq', seq, 'function', fn, 'agent', agent, 'status', 'running', 'phase', phase,
  'async', async, 'started', started, 'owner', owner, 'key', key)
if has_request == '1' then redis.call('HSET', h, 'request', request) end
redis.call('ZADD', P..'executions', seq, id)
redis.call('ZADD', P..'executions:f:'..fn, seq, id)
list(P, fn, 'running', seq, id)
place(P, fn, phase, agent, owner, seq, id)
return id
""",
)
# P, id, agent, phase, owner → 0 when it has ended, or is another's
MOVE = Script.of(
    _INDEX,
    """
local P, id, agent, phase, owner = unpack(ARGV)
local h = P..'execution:'..id
local e = redis.call('HMGET', h, 'function', 'status', 'phase', 'agent', 'owner', 'seq')
if e[2] ~= 'running' or e[5] ~= owner then return 0 end
displace(P, e[1], e[3], e[4], e[5], id)
redis.call('HSET', h, 'agent', agent, 'phase', phase)
place(P, e[1], phase, agent, owner, e[6], id)
return 1
""",
)
# P, id, status, agent, keep until, JSON
END = Script.of(
    _INDEX,
    """
local P, id, status, agent, keep, record = unpack(ARGV)
local h = P..'execution:'..id
local e = redis.call('HMGET', h, 'function', 'status', 'phase', 'agent', 'owner', 'seq')
if e[2] ~= 'running' then return 0 end
displace(P, e[1], e[3], e[4], e[5], id)
unlist(P, e[1], 'running', id)
list(P, e[1], status, e[6], id)
redis.call('HSET', h, 'status', status, 'phase', 'ended', 'agent', agent, 'keep', keep, 'record', record)
redis.call('HDEL', h, 'request')
redis.call('ZADD', P..'expiring', keep, id)
return 1
""",
)
# P, index, highest score, how many → their fields without the request
PAGE = Script.of(
    """
local P, index, highest, limit = unpack(ARGV)
local found = {}
for i, id in ipairs(redis.call('ZREVRANGEBYSCORE', P..index, highest, '-inf', 'LIMIT', 0, limit)) do
  found[i] = redis.call('HMGET', P..'execution:'..id,
    'id', 'seq', 'function', 'agent', 'status', 'phase', 'async', 'started', 'owner', 'key', 'keep', 'record')
end
return found
"""
)
# P, from, to, lease, token → 'late' or how many
ADOPT = Script.of(
    _FENCE,
    """
local P, from, to, lease, token = unpack(ARGV)
if too_late(P, lease, token) then return 'late' end
if from == to then return redis.call('ZCARD', P..'open:owner:'..from) end
local ids = redis.call('ZRANGE', P..'open:owner:'..from, 0, -1, 'WITHSCORES')
for i = 1, #ids, 2 do
  redis.call('HSET', P..'execution:'..ids[i], 'owner', to)
  redis.call('ZADD', P..'open:owner:'..to, ids[i + 1], ids[i])
end
redis.call('DEL', P..'open:owner:'..from)
return #ids / 2
""",
)
_FORGET = """
local function forget(P, id)
  local h = P..'execution:'..id
  local e = redis.call('HMGET', h, 'function', 'status', 'key', 'phase', 'agent', 'owner')
  redis.call('ZREM', P..'expiring', id)
  if not e[1] then return end
  if e[2] == 'running' then displace(P, e[1], e[4], e[5], e[6], id) end
  redis.call('ZREM', P..'executions', id)
  redis.call('ZREM', P..'executions:f:'..e[1], id)
  unlist(P, e[1], e[2], id)
  if e[3] ~= '' then redis.call('DEL', P..'idempotent:'..e[1]..':'..e[3]) end
  redis.call('DEL', h)
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
)
# P, now, how many at most → how many
EXPIRE = Script.of(
    _INDEX,
    _FORGET,
    """
local P, now, limit = unpack(ARGV)
local ids = redis.call('ZRANGEBYSCORE', P..'expiring', '-inf', now, 'LIMIT', 0, limit)
for _, id in ipairs(ids) do forget(P, id) end
return #ids
""",
)

# Of this server alone: the clocks of two Flux may be hours apart.
_NOW = """
local function clock()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1e6
end
"""
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
# P, name, token
RELEASE = Script.of(
    """
local P, name, token = unpack(ARGV)
if redis.call('HGET', P..'lease:'..name, 'token') == token then
  redis.call('HSET', P..'lease:'..name, 'expires', '0')
end
"""
)
# P: fails where a write would
PING = Script.of("redis.call('SET', ARGV[1]..'ping', '1', 'EX', 60)")

ALL = (
    UPLOAD,
    SAVE_FUNCTION,
    DELETE_FUNCTION,
    SET_FIELD,
    UPDATE_FIELD,
    DELETE_FIELD,
    CREATE,
    MOVE,
    END,
    PAGE,
    ADOPT,
    FORGET,
    EXPIRE,
    ACQUIRE,
    LEASES,
    RELEASE,
    PING,
)
