-- The locks of lock-db. A row is made when its name is first used and kept when the lock is released, so that
-- fencing tokens go on growing. Free means: expire_time is past. Times are UTC, 'YYYY-MM-DD HH:MM:SS.ffffff'.
CREATE TABLE IF NOT EXISTS distributed_lock (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    lock_name     TEXT COLLATE BINARY NOT NULL CHECK (length(CAST(lock_name AS BLOB)) BETWEEN 1 AND 255),
    -- 'insert' (a lease) or 'row' (the row lock): a name is used with one kind only.
    lock_kind     TEXT NOT NULL DEFAULT 'insert',
    -- 128 random bits in hexadecimal, fresh for each acquisition: of the present holder, or of the last one.
    secret_key    TEXT NOT NULL DEFAULT '',
    fencing_token INTEGER NOT NULL DEFAULT 0,
    -- Of the grant before: the numbers between the two belong to the present one.
    previous_token INTEGER NOT NULL DEFAULT 0,
    -- For people: host, process id and label of the present or last holder.
    owner         TEXT NOT NULL DEFAULT '',
    create_time   TEXT NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')),
    acquire_time  TEXT NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')),
    -- 1970-01-01 once released.
    expire_time   TEXT NOT NULL DEFAULT '1970-01-01 00:00:00.000000',
    -- How far ahead expire_time lies at most: the TTL of the lease. Below zero for a lock that is kept by `at_least`. Zero once a
    -- takeover has given notice, and in a row that nothing of its last holder can touch any more.
    ttl_micros    INTEGER NOT NULL DEFAULT 0,
    -- The processes that wait for it, the first one first: entries of 96 characters. Each has the version of this format
    -- ('1'), the secret of the process (32 characters), two times in milliseconds since 1970 (13 digits each), since when it
    -- waits and until when the entry is valid, the owner for people (29, padded with blanks), and the listener that a release
    -- notifies (8 hexadecimal digits).
    waiters       TEXT NOT NULL DEFAULT '' CHECK (length(waiters) % 96 = 0),
    CONSTRAINT distributed_lock_name UNIQUE (lock_name)
);
