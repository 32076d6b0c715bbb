//! The wait queue in a row: SQL that MySQL and MariaDB share.

/// Whether the queue begins with the entry of this key.
macro_rules! is_first {
    ($waiters:literal, $key:literal) => {
        concat!("LEFT(", $waiters, ", ", layout!(key), ") = ", $key)
    };
}

/// The queue without its first entry.
macro_rules! without_first {
    ($waiters:literal) => {
        concat!("SUBSTR(", $waiters, ", ", layout!(second_entry_at), ")")
    };
}

/// The queue after a grant: without its first entry, if that is the one of this key.
macro_rules! without_own_first {
    ($waiters:literal, $key:literal) => {
        concat!("IF(", is_first!($waiters, $key), ", ", without_first!($waiters), ", ", $waiters, ")")
    };
}

/// Whether the queue has room, and no entry of this key yet. An empty key never has room,
/// because an empty text is found everywhere.
macro_rules! has_room {
    ($waiters:literal, $key:literal) => {
        concat!("LENGTH(", $waiters, ") < ", layout!(full), " AND INSTR(", $waiters, ", ", $key, ") = 0")
    };
}

/// Milliseconds since 1970.
macro_rules! now_millis {
    () => {
        "TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) DIV 1000"
    };
}

/// The queue with an entry appended.
macro_rules! with_entry {
    ($waiters:literal, $key:literal, $rest:literal) => {
        concat!(
            "CONCAT(",
            $waiters,
            ", ",
            $key,
            ", LPAD(",
            now_millis!(),
            ", ",
            layout!(time),
            ", '0'), LPAD(",
            now_millis!(),
            " + ",
            layout!(lasts),
            ", ",
            layout!(time),
            ", '0'), ",
            $rest,
            ")"
        )
    };
}

/// The queue after a release: with an entry appended, unless it is empty. If no other process
/// waits, the next caller of this process needs no entry.
macro_rules! behind_others {
    ($waiters:literal, $key:literal, $rest:literal) => {
        concat!(
            "IF(",
            $waiters,
            " <> '' AND ",
            has_room!($waiters, $key),
            ", ",
            with_entry!($waiters, $key, $rest),
            ", ",
            $waiters,
            ")"
        )
    };
}

/// The queue without the entry at this position.
macro_rules! without {
    ($waiters:literal, $position:literal) => {
        concat!("INSERT(", $waiters, ", ", $position, ", ", layout!(entry), ", '')")
    };
}
