-- Monitor's database: the current state in ordinary tables, and the log of everything that ever changed.
-- A fresh database gets this file as it stands; an older one gets the numbered migrations in monitor.py.

-- The one row that numbers the log. The counter is taken in the transaction that writes the log row, so
-- numbers rise without gaps in commit order; an identity column would show rows out of order to readers
-- as soon as two connections write.
CREATE TABLE head (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    stream   TEXT    NOT NULL,              -- this database's own id: cursors of another one are refused
    seq      INTEGER NOT NULL,              -- the last number given; never lowered, never used twice
    pruned   INTEGER NOT NULL DEFAULT 0,    -- log rows up to here may have been removed
    secret   BLOB    NOT NULL               -- signs the browser's session cookies
) STRICT;

CREATE TABLE workstreams (
    number     INTEGER PRIMARY KEY,
    id         TEXT NOT NULL UNIQUE,        -- random UUID: short prefixes stay telling
    name       TEXT NOT NULL,
    status     TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'archived')),
    created_at TEXT NOT NULL,               -- RFC 3339, UTC, microseconds, ends in Z: sorts as text
    updated_at TEXT NOT NULL,
    metadata   TEXT NOT NULL DEFAULT '{}'   -- any JSON
) STRICT;

CREATE TABLE tasks (
    number             INTEGER PRIMARY KEY, -- 1, 2, 3 ... for people
    id                 TEXT    NOT NULL UNIQUE,
    workstream         INTEGER NOT NULL REFERENCES workstreams (number),
    name               TEXT    NOT NULL,
    status             TEXT    NOT NULL DEFAULT 'active'
                       CHECK (status IN ('active', 'blocked', 'done', 'cancelled')),
    summary_text       TEXT,
    summary_updated_at TEXT,
    summary_source     TEXT,
    hidden_at          TEXT,
    created_at         TEXT    NOT NULL,
    updated_at         TEXT    NOT NULL,
    metadata           TEXT    NOT NULL DEFAULT '{}'
) STRICT;
CREATE INDEX tasks_by_workstream ON tasks (workstream);

-- A task as clients know it: with the id of its workstream.
CREATE VIEW task_rows AS
    SELECT tasks.*, workstreams.id AS workstream_id, workstreams.status AS workstream_status
    FROM tasks JOIN workstreams ON workstreams.number = tasks.workstream;

-- The log is the product: every change is one row, its JSON made once, in the transaction that made it.
-- What stands in body is what lists answer, streams send and exports hold.
CREATE TABLE log (
    seq        INTEGER PRIMARY KEY,
    event      TEXT NOT NULL CHECK (event IN ('update', 'update_redacted', 'task_created', 'task_updated',
                                              'workstream_created', 'workstream_updated')),
    task       INTEGER REFERENCES tasks (number),
    workstream INTEGER NOT NULL REFERENCES workstreams (number),  -- where the task was at that moment
    body       TEXT NOT NULL                                      -- ASCII JSON
) STRICT;

-- Only what updates are filtered by: counting and filtering a million rows touches small rows.
CREATE TABLE updates (
    seq       INTEGER PRIMARY KEY REFERENCES log (seq),
    id        BLOB    NOT NULL UNIQUE,      -- the 16 bytes of its UUID version 7: rises with time
    task      INTEGER NOT NULL REFERENCES tasks (number),
    source    TEXT    NOT NULL,
    kind      TEXT,
    level     TEXT CHECK (level IN ('info', 'warn', 'error')),
    timestamp TEXT    NOT NULL,
    has_data  INTEGER NOT NULL CHECK (has_data IN (0, 1))
) STRICT;
CREATE INDEX updates_by_task ON updates (task);
CREATE INDEX updates_by_source ON updates (source);
CREATE INDEX updates_by_kind ON updates (kind);
CREATE INDEX updates_by_level ON updates (level);
CREATE INDEX updates_by_timestamp ON updates (timestamp);
CREATE INDEX updates_with_data ON updates (timestamp) WHERE has_data;

CREATE TABLE update_tags (
    tag TEXT    NOT NULL,
    seq INTEGER NOT NULL,                   -- of updates; no foreign key: it would want an index of its own
    PRIMARY KEY (tag, seq)
) STRICT, WITHOUT ROWID;

-- What a sender has named once: the same key again answers with the first update, for seven days.
CREATE TABLE idempotency_keys (
    key        TEXT    PRIMARY KEY,
    digest     BLOB    NOT NULL,            -- SHA-256 of what was sent with it
    seq        INTEGER NOT NULL,
    created_at TEXT    NOT NULL
) STRICT;
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);
CREATE INDEX idempotency_keys_by_seq ON idempotency_keys (seq);

-- Browser sessions are signed cookies; those that were ended before their time are remembered until then.
CREATE TABLE ended_sessions (
    signature TEXT PRIMARY KEY,
    until     TEXT NOT NULL
) STRICT;

-- Full-text search. The text is kept once, in the log; FTS5 reads it back through the view, so that
-- removing a row can tell the index what to forget.
CREATE VIEW update_messages AS
    SELECT seq, json_extract(body, '$.message') AS message FROM log WHERE event = 'update';
CREATE VIRTUAL TABLE update_search USING fts5 (
    message, content = 'update_messages', content_rowid = 'seq', tokenize = 'unicode61 remove_diacritics 2'
);
CREATE VIRTUAL TABLE task_search USING fts5 (
    name, summary_text, content = 'tasks', content_rowid = 'number', tokenize = 'unicode61 remove_diacritics 2'
);

-- What must never be: how many rows break a rule that no constraint can hold, and which.
CREATE VIEW faults (n, what) AS
    SELECT COUNT(*), 'log rows have a number beyond the counter' FROM log, head WHERE log.seq > head.seq
    UNION ALL SELECT COUNT(*), 'updates lack their row in the log' FROM updates
        WHERE seq NOT IN (SELECT seq FROM log WHERE event = 'update')
    UNION ALL SELECT COUNT(*), 'updates of the log are not listed' FROM log
        WHERE event = 'update' AND seq NOT IN (SELECT seq FROM updates)
    UNION ALL SELECT COUNT(*), 'tags belong to no update' FROM update_tags
        WHERE seq NOT IN (SELECT seq FROM updates)
    UNION ALL SELECT COUNT(*), 'updates are missing in the search index' FROM updates
        WHERE seq NOT IN (SELECT id FROM update_search_docsize)
    UNION ALL SELECT COUNT(*), 'entries of the search index belong to no update' FROM update_search_docsize
        WHERE id NOT IN (SELECT seq FROM updates);
