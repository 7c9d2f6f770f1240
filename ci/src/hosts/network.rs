//! Hosts on one machine: network namespaces around a router that is a namespace, too. Each host has a network of
//! its own, `10.77.N.0/24` and `fd77:N::/64`, in which the router is number 1 and the host is number 2. So
//! what passes between two hosts can be cut in one direction only, and the machine's own network is untouched.
#![forbid(unsafe_code)]

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The largest packet on a shaped link before it is cut into segments.
const GSO_BYTES: u32 = 16 << 10;

/// Which addresses the hosts have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// IPv4 and IPv6.
    Both,
    /// IPv6 alone.
    V6,
}

/// Namespaces of a router and its hosts; they go when this is dropped.
pub struct Network {
    prefix: String,
    hosts: u32,
}

impl Network {
    /// Why there can be none here, if so.
    pub fn missing() -> Option<&'static str> {
        if !rustix::process::geteuid().is_root() {
            return Some("network namespaces take root");
        }
        if Command::new("ip").arg("-V").output().is_err() {
            return Some("no program ip (Debian: iproute2)");
        }
        None
    }

    /// Makes the hosts and lets the router forward between all of them.
    pub fn new(hosts: u32, family: Family) -> Result<Network, String> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let network = Network { prefix: format!("carole{}n{number}", std::process::id()), hosts };
        // A run that was killed may have had this number.
        network.remove();
        let router = network.router();
        ip(&format!("netns add {router}"))?;
        for file in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            inside(&router, &["sh", "-c", &format!("echo 1 > /proc/sys/net/{file}")])?;
        }
        for n in 0..hosts {
            network.add_host(n, family)?;
        }
        network.wait_for_carriers()?;
        Ok(network)
    }

    /// The kernel tells of a new link's carrier up to a second later, and until then the address is not offered.
    fn wait_for_carriers(&self) -> Result<(), String> {
        let until = Instant::now() + Duration::from_secs(10);
        for host in self.all() {
            while !output("ip", &["-n", &host, "link", "show", "eth0"])?.contains("state UP") {
                if Instant::now() >= until {
                    return Err(format!("eth0 of {host} does not come up"));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    fn add_host(&self, n: u32, family: Family) -> Result<(), String> {
        let (router, host) = (self.router(), self.host(n));
        ip(&format!("netns add {host}"))?;
        ip(&format!("-n {host} link set lo up"))?;
        ip(&format!("-n {router} link add to{n} type veth peer name eth0 netns {host}"))?;
        let networks: &[String] = match family {
            Family::Both => &[format!("10.77.{n}.{{}}/24"), format!("fd77:{n}::{{}}/64")],
            Family::V6 => &[format!("fd77:{n}::{{}}/64")],
        };
        for network in networks {
            let nodad = if network.contains("::") { "nodad" } else { "" };
            ip(&format!("-n {router} addr add {} dev to{n} {nodad}", network.replace("{}", "1")))?;
            ip(&format!("-n {host} addr add {} dev eth0 {nodad}", network.replace("{}", "2")))?;
        }
        ip(&format!("-n {router} link set to{n} up"))?;
        ip(&format!("-n {host} link set eth0 up"))?;
        for network in networks {
            let gateway = network.replace("{}", "1");
            let gateway = gateway.split('/').next().expect("split gives one at least");
            ip(&format!("-n {host} route add default via {gateway}"))?;
        }
        Ok(())
    }

    fn router(&self) -> String {
        format!("{}r", self.prefix)
    }

    /// The namespace of a host.
    pub fn host(&self, n: u32) -> String {
        format!("{}h{n}", self.prefix)
    }

    /// The namespaces of all hosts.
    pub fn all(&self) -> Vec<String> {
        (0..self.hosts).map(|n| self.host(n)).collect()
    }

    /// Gives every host an interface with one and the same address, as container engines do: an address that
    /// names another machine's own.
    pub fn add_decoys(&self) -> Result<(), String> {
        for host in self.all() {
            ip(&format!("-n {host} link add docker0 type bridge"))?;
            ip(&format!("-n {host} addr add 172.17.0.1/16 dev docker0"))?;
            ip(&format!("-n {host} link set docker0 up"))?;
        }
        Ok(())
    }

    /// Gives a host an interface that is up, has this address, and leads nowhere.
    pub fn add_dead_end(&self, n: u32, address: &str) -> Result<(), String> {
        let host = self.host(n);
        ip(&format!("-n {host} link add dead0 type veth peer name dead1"))?;
        ip(&format!("-n {host} addr add {address}/24 dev dead0"))?;
        ip(&format!("-n {host} link set dead0 up"))?;
        ip(&format!("-n {host} link set dead1 up"))
    }

    /// From now on packets from one host to another vanish, without a word to either.
    pub fn drop_packets(&self, from: u32, to: u32) -> Result<(), String> {
        let router = self.router();
        for (family, target) in [("-4", format!("10.77.{to}.0/24")), ("-6", format!("fd77:{to}::/64"))] {
            ip(&format!("{family} -n {router} rule add iif to{from} to {target} blackhole"))?;
        }
        Ok(())
    }

    /// From now on nothing comes from a host or gets there: its cable is out.
    pub fn unplug(&self, n: u32) -> Result<(), String> {
        ip(&format!("-n {} link set to{n} down", self.router()))
    }

    /// Its cable is in again.
    pub fn plug_in(&self, n: u32) -> Result<(), String> {
        let router = self.router();
        ip(&format!("-n {router} link set to{n} up"))?;
        // The kernel takes IPv6 addresses from an interface that goes down.
        ip(&format!("-n {router} addr replace fd77:{n}::1/64 dev to{n} nodad"))
    }

    /// Gives every host a second network beside the first, `10.78.N.0/24`, over the same router.
    pub fn add_second_interfaces(&self) -> Result<(), String> {
        let router = self.router();
        for n in 0..self.hosts {
            let host = self.host(n);
            ip(&format!("-n {router} link add two{n} type veth peer name eth1 netns {host}"))?;
            ip(&format!("-n {router} addr add 10.78.{n}.1/24 dev two{n}"))?;
            ip(&format!("-n {host} addr add 10.78.{n}.2/24 dev eth1"))?;
            ip(&format!("-n {router} link set two{n} up"))?;
            ip(&format!("-n {host} link set eth1 up"))?;
            // What comes from the second address leaves by the second interface, as on hosts with two networks.
            ip(&format!("-n {host} route add 10.78.0.0/16 via 10.78.{n}.1 dev eth1"))?;
            ip(&format!("-n {host} route add default via 10.78.{n}.1 dev eth1 table 78"))?;
            ip(&format!("-n {host} rule add from 10.78.{n}.2 table 78"))?;
        }
        Ok(())
    }

    /// From now on every host's link carries this much in each direction and no more.
    pub fn shape(&self, mbits: u32) -> Result<(), String> {
        let tc = |namespace: &str, device: &str| {
            // As little as passes unshaped, but what the clock that serves the queue lets through at once.
            let burst = (mbits / 40).max(48);
            let line = format!(
                "-n {namespace} qdisc replace dev {device} root tbf rate {mbits}mbit burst {burst}kb latency 30ms"
            );
            output("tc", &line.split_whitespace().collect::<Vec<_>>()).map(drop)
        };
        let router = self.router();
        for n in 0..self.hosts {
            // A packet that exceeds the burst would be cut into segments by software, one MTU each, and the
            // processors would be the limit instead of the link.
            ip(&format!("-n {} link set eth0 gso_max_size {GSO_BYTES}", self.host(n)))?;
            ip(&format!("-n {router} link set to{n} gso_max_size {GSO_BYTES}"))?;
            tc(&self.host(n), "eth0")?;
            tc(&router, &format!("to{n}"))?;
        }
        Ok(())
    }

    fn remove(&self) {
        for name in self.all().into_iter().chain([self.router()]) {
            // One that does not exist needs no removal.
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.remove();
    }
}

fn ip(line: &str) -> Result<(), String> {
    output("ip", &line.split_whitespace().collect::<Vec<_>>()).map(drop)
}

/// Runs a command in a namespace.
pub fn inside(namespace: &str, command: &[&str]) -> Result<(), String> {
    output("ip", &[&["netns", "exec", namespace], command].concat()).map(drop)
}

/// What a command prints.
pub fn output(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).output().map_err(|e| format!("{program}: {e}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => {
            Err(format!("{program} {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
        }
    }
}
