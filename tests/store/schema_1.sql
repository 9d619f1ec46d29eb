-- flux.db as the first version made it.
CREATE TABLE functions (name TEXT PRIMARY KEY, code_digest TEXT NOT NULL, data TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE archives (digest TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE agents (id TEXT PRIMARY KEY, data TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE leases (
    name TEXT PRIMARY KEY, owner TEXT NOT NULL, token INTEGER NOT NULL, expires_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE executions (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    function TEXT NOT NULL,
    agent TEXT NOT NULL,
    status TEXT NOT NULL,
    phase TEXT NOT NULL,
    asynchronous INTEGER NOT NULL,
    started_at REAL NOT NULL,
    owner TEXT NOT NULL,
    idempotency_key TEXT,
    keep_until REAL,
    request BLOB,
    record TEXT
);
CREATE INDEX executions_by_function ON executions (function, sequence);
CREATE INDEX executions_by_status ON executions (status, sequence);
CREATE INDEX executions_by_both ON executions (function, status, sequence);
CREATE INDEX executions_open ON executions (agent, sequence) WHERE status = 'running';
CREATE INDEX executions_queued ON executions (sequence) WHERE status = 'running' AND phase = 'queued';
CREATE INDEX executions_owned ON executions (owner, sequence) WHERE status = 'running';
CREATE UNIQUE INDEX executions_idempotent ON executions (function, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX executions_expiring ON executions (keep_until) WHERE keep_until IS NOT NULL;
INSERT INTO counters VALUES ('functions', 0), ('lease-tokens', 0);
PRAGMA user_version=1;
