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

-- Runs of coding agents: the task that each belongs to, and whether it waits for a person. A subagent has a
-- row of its own while it asks for something: what the others do meanwhile is no answer to it.
CREATE TABLE sessions (
    agent      TEXT    NOT NULL,            -- claude, codex, gemini, copilot, cursor
    id         TEXT    NOT NULL,
    subagent   TEXT    NOT NULL DEFAULT '', -- '': the run itself
    task       INTEGER NOT NULL REFERENCES tasks (number),
    asked      TEXT,                        -- the task that its environment names: heeded once
    folder     TEXT    NOT NULL,            -- where it works now
    project    TEXT    NOT NULL,            -- the folder of its repository, of the main worktree
    branch     TEXT    NOT NULL,            -- '': unknown, or none
    repository TEXT    NOT NULL,            -- owner/name of its origin, or ''
    model      TEXT,
    started_at TEXT    NOT NULL,
    seen_at    TEXT    NOT NULL,            -- when its newest event happened
    heard_at   TEXT    NOT NULL,            -- the newest of its main thread: what is older comes late
    state      TEXT    NOT NULL DEFAULT 'new'
               CHECK (state IN ('new', 'working', 'blocked', 'idle', 'stuck', 'ended', 'replaced')),
    since      TEXT    NOT NULL,            -- when the state began
    message    TEXT,                        -- what it said then: the question, the last words
    tool       TEXT,                        -- what it asks to use
    seq        INTEGER,                     -- the update that said so
    PRIMARY KEY (agent, id, subagent)
) STRICT, WITHOUT ROWID;
CREATE INDEX sessions_by_task ON sessions (task, state);
CREATE INDEX sessions_by_folder ON sessions (folder, state);
CREATE INDEX sessions_by_state ON sessions (state, seen_at);
CREATE INDEX sessions_by_branch ON sessions (branch, seen_at);
CREATE INDEX sessions_by_repository ON sessions (repository COLLATE NOCASE, seen_at);

-- The folder of a repository (of its main worktree), and the workstream of the runs in it; or owner/name, where
-- GitHub told of it first.
CREATE TABLE folders (
    path       TEXT    PRIMARY KEY,
    workstream INTEGER NOT NULL REFERENCES workstreams (number)
) STRICT, WITHOUT ROWID;

-- What a task is about: work that is seen there belongs to it.
CREATE TABLE links (
    kind       TEXT    NOT NULL        -- repo: all that nothing else places; inbox: the same, made by us
               CHECK (kind IN ('folder', 'branch', 'pr', 'issue', 'commit', 'repo', 'inbox')),
    value      TEXT    NOT NULL,
    repository TEXT    NOT NULL DEFAULT '' COLLATE NOCASE, -- owner/name or a folder; '': in any
    task       INTEGER NOT NULL REFERENCES tasks (number),
    learnt     INTEGER NOT NULL DEFAULT 0 CHECK (learnt IN (0, 1)), -- from an event; what a person set stays
    close_on_merge INTEGER NOT NULL DEFAULT 0 CHECK (close_on_merge IN (0, 1)),
    PRIMARY KEY (kind, value, repository)
) STRICT, WITHOUT ROWID;
CREATE INDEX links_by_task ON links (task);
CREATE VIEW link_rows AS
    SELECT kind AS link, value, nullif(repository, '') AS repository, tasks.id AS task_id, task,
           nullif(learnt, 0) AS learnt, nullif(close_on_merge, 0) AS close_on_merge
    FROM links JOIN tasks ON tasks.number = task;

-- Pull requests as their tasks show them.
CREATE TABLE pull_requests (
    task       INTEGER NOT NULL REFERENCES tasks (number),
    repository TEXT    NOT NULL,
    number     INTEGER NOT NULL,
    branch     TEXT    NOT NULL,            -- as in checks
    state      TEXT    NOT NULL CHECK (state IN ('open', 'closed', 'merged')),
    url        TEXT    NOT NULL,
    at         TEXT    NOT NULL,            -- its own time: events come in any order
    PRIMARY KEY (task, repository, number)
) STRICT, WITHOUT ROWID;

-- Checks of a task: the newest run of each and, settled, the newest that passed or failed. Two rows, for a run
-- that is queued or cancelled does not undo a failure, and events come in any order.
CREATE TABLE checks (
    task       INTEGER NOT NULL REFERENCES tasks (number),
    repository TEXT    NOT NULL,
    branch     TEXT    NOT NULL,            -- fork:branch in a fork; '': unknown
    name       TEXT    NOT NULL,            -- workflow_run:PATH, check_run:NAME, status:CONTEXT ...
    settled    INTEGER NOT NULL CHECK (settled IN (0, 1)),
    part       INTEGER NOT NULL CHECK (part IN (0, 1)),  -- a job: it says nothing where its workflow is seen
    run        INTEGER NOT NULL,            -- the number of the run, or its id
    attempt    INTEGER NOT NULL,
    state      TEXT    NOT NULL CHECK (state IN ('queued', 'running', 'passed', 'failed', 'cancelled')),
    url        TEXT    NOT NULL,
    at         TEXT    NOT NULL,
    seq        INTEGER,                     -- the update that said so
    PRIMARY KEY (task, repository, branch, name, settled)
) STRICT, WITHOUT ROWID;
-- What events tell is written into these two views: the newest is kept, whatever the order of delivery. A run that
-- has ended never turns back; what was merged stays so, and of the same second, to be closed is the newer. `now`
-- stands in for a time that is none. An inbox gives up what has found its task.
CREATE VIEW check_events AS SELECT *, at AS now FROM checks;
CREATE TRIGGER check_told INSTEAD OF INSERT ON check_events BEGIN
    INSERT INTO checks (task, repository, branch, name, settled, part, run, attempt, state, url, at, seq)
        SELECT new.task, new.repository, new.branch, new.name, value, new.part,
               CASE WHEN typeof(new.run) = 'integer' THEN new.run ELSE 0 END,
               CASE WHEN typeof(new.attempt) = 'integer' THEN new.attempt ELSE 1 END,
               new.state, new.url,
               coalesce(strftime('%Y-%m-%dT%H:%M:%f000Z', CASE WHEN new.at GLOB '[12]???-*' THEN new.at END), new.now),
               new.seq
        FROM json_each(CASE WHEN new.state IN ('passed', 'failed') THEN '[0, 1]' ELSE '[0]' END) WHERE TRUE
        ON CONFLICT DO UPDATE SET run = excluded.run, attempt = excluded.attempt, state = excluded.state,
            url = excluded.url, at = excluded.at, seq = excluded.seq
        WHERE (excluded.run, excluded.attempt, excluded.state NOT IN ('queued', 'running'),
               excluded.state = 'running', excluded.at)
            > (run, attempt, state NOT IN ('queued', 'running'), state = 'running', at);
    -- An inbox gives up what has found its task; so does a task whose branch leads elsewhere by now.
    DELETE FROM checks WHERE task <> new.task
        AND repository = new.repository AND branch = new.branch AND name = new.name
        AND (task IN (SELECT task FROM links WHERE kind = 'inbox')
             OR (typeof(new.run) = 'integer' AND typeof(new.attempt) = 'integer'
                 AND (run, attempt) < (new.run, new.attempt)));
END;
CREATE VIEW pull_events AS SELECT *, NULL AS seq, at AS now FROM pull_requests;
CREATE TRIGGER pull_told INSTEAD OF INSERT ON pull_events
WHEN typeof(new.number) = 'integer' AND new.state IN ('open', 'closed', 'merged') BEGIN
    INSERT INTO pull_requests (task, repository, number, branch, state, url, at)
        VALUES (new.task, new.repository, new.number, new.branch, new.state, new.url,
            coalesce(strftime('%Y-%m-%dT%H:%M:%f000Z', CASE WHEN new.at GLOB '[12]???-*' THEN new.at END), new.now))
        ON CONFLICT DO UPDATE SET branch = excluded.branch, state = excluded.state, url = excluded.url,
            at = excluded.at
        WHERE (excluded.state = 'merged', excluded.at, excluded.state = 'closed')
            > (state = 'merged', at, state = 'closed');
    DELETE FROM pull_requests WHERE task <> new.task
        AND repository = new.repository AND number = new.number
        AND (task IN (SELECT task FROM links WHERE kind = 'inbox')
             OR at < strftime('%Y-%m-%dT%H:%M:%f000Z', CASE WHEN new.at GLOB '[12]???-*' THEN new.at END));
END;
-- Those that count: live as long as the newest pull request of their branch is open, or there is none.
CREATE VIEW check_rows AS
    SELECT checks.*, 'open' = coalesce(
        (SELECT state FROM pull_requests AS p
         WHERE p.task = checks.task AND p.repository = checks.repository AND p.branch = checks.branch
         ORDER BY number DESC LIMIT 1), 'open') AS live
    FROM checks
    WHERE NOT part OR NOT EXISTS (
        SELECT 1 FROM checks AS whole
        WHERE whole.task = checks.task AND whole.repository = checks.repository
          AND whole.branch = checks.branch AND whole.name GLOB 'workflow_run:*');

-- A run as clients know it.
CREATE VIEW session_rows AS
    SELECT agent || ':' || sessions.id AS source, agent, tasks.id AS task_id, folder, project,
           nullif(branch, '') AS branch, nullif(repository, '') AS repository, model, started_at, seen_at,
           state, since, message, seq, nullif(subagent, '') AS subagent, task
    FROM sessions JOIN tasks ON tasks.number = sessions.task ORDER BY seen_at DESC;

-- What asks for somebody's attention, the most urgent with the lowest rank: of the runs, and of the checks. Two
-- views, for SQLite does not carry the task that is asked for into one of both.
CREATE VIEW attention AS
    SELECT task, CASE state WHEN 'blocked' THEN 1 WHEN 'stuck' THEN 3 ELSE 4 END AS rank, since, state,
           json_object('state', state, 'message', message, 'since', since, 'seq', seq,
                       'source', agent || ':' || id) AS body
    FROM sessions WHERE state IN ('blocked', 'stuck', 'idle');
CREATE VIEW check_attention AS
    SELECT task, 2 AS rank, at AS since, state,
           json_patch('{}', json_object('state', state, 'since', at, 'seq', seq, 'message', coalesce(
               (SELECT message FROM update_messages WHERE update_messages.seq = check_rows.seq),
               name || ' failed'))) AS body
    FROM check_rows WHERE settled AND state = 'failed' AND live;

-- A task as clients know it: with the id of its workstream, what asks for attention, the state of its checks (the
-- worst of the newest runs) and its newest pull requests. A task that is
-- over shows only who waits for an answer.
CREATE VIEW task_rows AS
    SELECT tasks.*, workstreams.id AS workstream_id, workstreams.status AS workstream_status,
           (SELECT body FROM (SELECT * FROM attention WHERE attention.task = tasks.number UNION ALL
                              SELECT * FROM check_attention WHERE check_attention.task = tasks.number)
            WHERE rank = 1 OR tasks.status IN ('active', 'blocked')
            ORDER BY rank, since LIMIT 1) AS attention,
           (SELECT json_patch('{}', json_object('state', state, 'url', nullif(url, ''), 'run', run,
                'attempt', attempt, 'at', at))
            FROM check_rows WHERE check_rows.task = tasks.number AND NOT settled
            ORDER BY live DESC, CASE state WHEN 'failed' THEN 1 WHEN 'running' THEN 2 WHEN 'queued' THEN 3
                WHEN 'cancelled' THEN 4 ELSE 5 END, at DESC LIMIT 1) AS ci,
           nullif((SELECT json_group_array(json_patch('{}', json_object('number', number, 'state', state,
                'url', nullif(url, ''))))
            FROM (SELECT * FROM pull_requests WHERE pull_requests.task = tasks.number
                  ORDER BY state <> 'open', at DESC, number DESC LIMIT 20)), '[]') AS pull_requests
    FROM tasks JOIN workstreams ON workstreams.number = tasks.workstream;

-- The log is the product: every change is one row, its JSON made once, in the transaction that made it.
-- What stands in body is what lists answer, streams send and exports hold.
CREATE TABLE log (
    seq        INTEGER PRIMARY KEY,
    event      TEXT NOT NULL CHECK (event IN ('update', 'update_redacted', 'task_created', 'task_updated',
                                              'workstream_created', 'workstream_updated', 'updates_moved')),
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
-- With what is filtered on inside a task: counting the 100,000 updates of one reads no row of the table.
CREATE INDEX updates_by_task ON updates (task, seq, kind, level);
CREATE INDEX updates_by_source ON updates (source);
CREATE INDEX updates_by_kind ON updates (kind);
CREATE INDEX updates_by_level ON updates (level);
CREATE INDEX updates_by_timestamp ON updates (timestamp);
CREATE INDEX updates_with_data ON updates (timestamp) WHERE has_data;

CREATE VIEW newest_of_tasks AS
    SELECT tasks.id AS task_id, log.body
    FROM tasks JOIN log ON log.seq = (SELECT MAX(seq) FROM updates WHERE updates.task = tasks.number);

CREATE TABLE update_tags (
    tag TEXT    NOT NULL,
    seq INTEGER NOT NULL,                   -- of updates; no foreign key: it would want an index of its own
    PRIMARY KEY (tag, seq)
) STRICT, WITHOUT ROWID;

-- What a sender has named once: the same key again answers with the first update, for seven days. Hooks that
-- come twice are told by such a key too.
CREATE TABLE idempotency_keys (
    key        TEXT    PRIMARY KEY,
    digest     BLOB    NOT NULL,            -- SHA-256 of what was sent with it
    seq        INTEGER,                     -- of its update; NULL: a hook that is not stored
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

-- The indexes of what is removed or changed follow here; what is added is indexed by who adds it.
CREATE TRIGGER task_indexed AFTER INSERT ON tasks BEGIN
    INSERT INTO task_search (rowid, name, summary_text) VALUES (new.number, new.name, new.summary_text);
END;
CREATE TRIGGER task_reindexed AFTER UPDATE OF name, summary_text ON tasks BEGIN
    INSERT INTO task_search (task_search, rowid, name, summary_text)
        VALUES ('delete', old.number, old.name, old.summary_text);
    INSERT INTO task_search (rowid, name, summary_text) VALUES (new.number, new.name, new.summary_text);
END;
CREATE TRIGGER update_reindexed AFTER UPDATE OF body ON log
WHEN old.event = 'update' AND json_extract(old.body, '$.message') <> json_extract(new.body, '$.message') BEGIN
    INSERT INTO update_search (update_search, rowid, message)
        VALUES ('delete', old.seq, json_extract(old.body, '$.message'));
    INSERT INTO update_search (rowid, message) VALUES (new.seq, json_extract(new.body, '$.message'));
END;
CREATE TRIGGER update_removed AFTER DELETE ON log WHEN old.event = 'update' BEGIN
    INSERT INTO update_search (update_search, rowid, message)
        VALUES ('delete', old.seq, json_extract(old.body, '$.message'));
    DELETE FROM update_tags
        WHERE seq = old.seq AND tag IN (SELECT value FROM json_each(old.body, '$.tags'));
    DELETE FROM idempotency_keys WHERE seq = old.seq;
    UPDATE head SET pruned = max(pruned, old.seq);
END;
-- An update that moves to another task takes its row in the log with it.
CREATE TRIGGER update_moved AFTER UPDATE OF task ON updates BEGIN
    UPDATE log SET (task, workstream, body) = (
        SELECT number, tasks.workstream, json_set(body, '$.task_id', id) FROM tasks WHERE number = new.task)
    WHERE seq = new.seq;
END;

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

-- What follows came later: a fresh database gets it, too, and an older one only this.
-- Version 2
ALTER TABLE tasks ADD COLUMN status_since TEXT; -- NULL: since it was made
UPDATE tasks SET status_since = updated_at WHERE status <> 'active';
CREATE TRIGGER task_status_changed AFTER UPDATE OF status ON tasks
WHEN old.status <> new.status AND old.status_since IS new.status_since BEGIN -- else an import says since when
    UPDATE tasks SET status_since = new.updated_at WHERE number = new.number;
END;

-- What was done to tasks, each event of the log beside the one before it: a few of its rows, hence the index.
CREATE INDEX log_of_tasks ON log (task, seq) WHERE event IN ('task_created', 'task_updated');
CREATE VIEW task_changes AS
    SELECT seq, task, json_extract(body, '$.updated_at') AS timestamp,
           json_extract(body, '$.status') AS status, json_extract(earlier, '$.status') AS old_status,
           json_extract(body, '$.name') AS name, json_extract(earlier, '$.name') AS old_name,
           (SELECT name FROM workstreams WHERE number = workstream) AS workstream,
           (SELECT name FROM workstreams WHERE id = json_extract(earlier, '$.workstream_id')) AS old_workstream
    FROM (SELECT now.*, (SELECT body FROM log AS old
                         WHERE old.task = now.task AND old.seq < now.seq
                           AND old.event IN ('task_created', 'task_updated')
                         ORDER BY old.seq DESC LIMIT 1) AS earlier
          FROM log AS now WHERE now.event IN ('task_created', 'task_updated'))
    WHERE earlier IS NOT NULL
      AND (json_extract(body, '$.status'), json_extract(body, '$.name'), json_extract(body, '$.workstream_id'))
       <> (json_extract(earlier, '$.status'), json_extract(earlier, '$.name'),
           json_extract(earlier, '$.workstream_id'));
