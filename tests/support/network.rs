//! A separate network for a child process, which can be disconnected from this one.

use std::net::Ipv4Addr;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};

/// A network namespace of the kernel, with one wire to the network of this process. Needs root
/// privileges.
///
/// It lasts as long as a process runs in it, so nothing is left when this process is killed.
#[derive(Debug)]
pub struct Network {
    /// Ends when the pipe closes, or when this value is dropped.
    holder: Child,
    _pipe: Option<ChildStdin>,
    wire: String,
    outside: Ipv4Addr,
}

static NUMBER: AtomicU8 = AtomicU8::new(0);

impl Network {
    /// Returns the reason if a namespace can't be created.
    pub fn new() -> Result<Self, String> {
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("unshare: {error}"))?;
        // The first line comes from inside the namespace.
        let mut line = String::new();
        let inside = holder.stdout.take().map(std::io::BufReader::new);
        let read = inside.map(|mut output| std::io::BufRead::read_line(&mut output, &mut line));
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        let wire = format!("ldb{process:x}n{number}");
        let network = Self {
            _pipe: holder.stdin.take(),
            outside: Ipv4Addr::new(10, 100 + u8::try_from(process % 100).unwrap_or(0), number, 1),
            holder,
            wire,
        };
        if !matches!(read, Some(Ok(1))) {
            return Err("no namespace without the rights of root".to_owned());
        }
        let (holder, wire) = (network.holder.id().to_string(), &network.wire);
        let outside = format!("{}/30", network.outside);
        let inside = format!("{}/30", Ipv4Addr::from_bits(network.outside.to_bits() + 1));
        run("ip", &["link", "add", wire, "type", "veth", "peer", "name", "wire", "netns", &holder])?;
        run("ip", &["address", "add", &outside, "dev", wire])?;
        run("ip", &["link", "set", wire, "up"])?;
        network.run_inside(&["ip", "address", "add", &inside, "dev", "wire"])?;
        network.run_inside(&["ip", "link", "set", "wire", "up"])?;
        network.run_inside(&["ip", "link", "set", "lo", "up"])?;
        Ok(network)
    }

    /// The address at which processes inside reach this process.
    pub fn outside(&self) -> Ipv4Addr {
        self.outside
    }

    /// The prefix of a command that is to run inside.
    pub(crate) fn enter(&self) -> [String; 3] {
        ["nsenter".to_owned(), format!("--net=/proc/{}/ns/net", self.holder.id()), "--".to_owned()]
    }

    /// Disconnects the wire. From then on nothing arrives on either side, and neither side is
    /// notified.
    pub fn part(&self) {
        run("ip", &["link", "set", &self.wire, "down"]).expect("the wire is there");
    }

    /// Connects the wire again. The kernel retransmits what was sent in the meantime.
    pub fn join(&self) {
        run("ip", &["link", "set", &self.wire, "up"]).expect("the wire is there");
    }

    fn run_inside(&self, command: &[&str]) -> Result<(), String> {
        let [program, namespace, end] = self.enter();
        run(&program, &[&[&*namespace, &*end], command].concat())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        drop(self.holder.kill());
        drop(self.holder.wait());
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let told =
        Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if told.status.success() {
        return Ok(());
    }
    Err(format!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&told.stderr).trim()))
}
