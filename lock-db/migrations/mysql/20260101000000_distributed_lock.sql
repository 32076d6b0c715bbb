-- The locks of lock-db, on MySQL and MariaDB. A row is made when its name is first used and kept when the lock is
-- released, so that fencing tokens go on growing. Free means: expire_time is past. All times are UTC.
CREATE TABLE IF NOT EXISTS distributed_lock (
    id            BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
    -- VARBINARY is the one type that both compare byte by byte: every collation folds case, accents or trailing blanks.
    lock_name     VARBINARY(255) NOT NULL,
    -- 'insert' (a lease) or 'row' (SELECT ... FOR UPDATE): a name is used with one kind only.
    lock_kind     VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL DEFAULT 'insert',
    -- 128 random bits in hexadecimal, fresh for each acquisition: of the present holder, or of the last one.
    secret_key    VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL DEFAULT '',
    fencing_token BIGINT NOT NULL DEFAULT 0,
    -- Of the grant before: the numbers between the two belong to the present one.
    previous_token BIGINT NOT NULL DEFAULT 0,
    -- For people: host, process id and label of the present or last holder.
    owner         VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL DEFAULT '',
    create_time   DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
    acquire_time  DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)),
    -- 1970-01-01 once released.
    expire_time   DATETIME(6) NOT NULL DEFAULT '1970-01-01 00:00:00',
    -- How far ahead expire_time lies at most: the TTL of the lease. Below zero for a lock that is kept by `at_least`. Zero once a
    -- takeover has given notice, and in a row that nothing of its last holder can touch any more.
    ttl_micros    BIGINT NOT NULL DEFAULT 0,
    -- Written by the guard of a transaction where a shared lock on the row is not enough: on multi-primary clusters.
    guard_count   BIGINT NOT NULL DEFAULT 0,
    -- The processes that wait for it, the first one first: entries of 96 characters. Each has the version of this format
    -- ('1'), the secret of the process (32 characters), two times in milliseconds since 1970 (13 digits each), since when it
    -- waits and until when the entry is valid, the owner for people (29, padded with blanks), and the listener that a release
    -- notifies (8 hexadecimal digits).
    waiters       VARCHAR(6144) CHARACTER SET ascii COLLATE ascii_bin NOT NULL DEFAULT '',
    CONSTRAINT distributed_lock_name UNIQUE (lock_name)
    -- Not on MariaDB, where the statements of lock-db pass the key of an entry in this column. Before 8.0.16, MySQL has no CHECK.
    /*!80016 , CONSTRAINT distributed_lock_waiters CHECK (LENGTH(waiters) % 96 = 0) */
) ENGINE = InnoDB ROW_FORMAT = DYNAMIC;
