//! Ranks find and prove each other over real sockets: several ranks as threads of one process.

mod meeting;

use carole::config::Config;
use carole::error::{Error, Result};
use carole::rendezvous::client::{Join, Joined, join};
use carole::rendezvous::porter::{Choice, PorterOptions};
use carole::rendezvous::secret::Secret;
use carole::rendezvous::server::{Bind, Server, ServerOptions};
use carole::types::{Epoch, Rank};
use meeting::{
    Node, alone, environment, free_port, join_all, mesh, options, private, quiet, rank_environment, stop,
    unique,
};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn secret_file(secret: &Secret) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o600)).unwrap();
    file.write_all(secret.to_hex().as_bytes()).unwrap();
    file
}

fn text(result: Result<Joined>) -> String {
    match result {
        Ok(_) => panic!("this must fail"),
        Err(error) => {
            assert!(matches!(error, Error::Usage(_)));
            error.to_string()
        }
    }
}

#[test]
fn without_variables_a_rank_is_alone() {
    let _alone = alone();
    let joined = join(&Join::new(environment(&[]), Epoch(0), quiet())).unwrap();
    assert_eq!((joined.rank, joined.table.cards.len()), (Rank(0), 1));
    stop(vec![Node::start(joined, PorterOptions::default())]);
}

#[test]
fn one_host_without_anything_set_forms_links_of_every_kind() {
    let _alone = alone();
    let before = descriptors();
    for (choice, lanes, kind) in
        [(Choice::Auto, 1, "shm"), (Choice::Shm, 1, "shm"), (Choice::Tcp, 1, "tcp"), (Choice::Tcp, 4, "tcp")]
    {
        for size in [2, 5] {
            let joined = join_all(size, private(&unique("kinds"), size));
            stop(mesh(joined, options(choice, lanes), kind));
        }
    }
    assert_eq!(descriptors(), before, "descriptors leak");
}

#[test]
fn links_of_an_encrypted_job_are_encrypted_over_tcp() {
    let _alone = alone();
    let before = descriptors();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret.clone().encrypting(true), 3, 10_000);
    for (epoch, (choice, lanes, kind)) in
        [(Choice::Tcp, 1, "tls"), (Choice::Tcp, 3, "tls"), (Choice::Auto, 1, "shm")].into_iter().enumerate()
    {
        let ours = launched(&server, &secret, 3);
        let how = |rank| Join { encrypts: true, epoch: Epoch(epoch as u32), ..ours(rank) };
        stop(mesh(join_all(3, how), options(choice, lanes), kind));
    }
    server.shutdown();
    assert_eq!(descriptors(), before, "descriptors leak");
}

#[test]
fn an_encrypted_job_takes_no_connection_in_clear_and_says_so() {
    let _alone = alone();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret.clone().encrypting(true), 2, 500);
    let said = text(join(&launched(&server, &secret, 2)(1)));
    assert!(said.contains("CAROLE_ENCRYPT=1") && said.contains("--encrypt"), "{said}");
    // Nor one that proves another secret: by the key alone, before a word of the job is said.
    let other = Secret::mint().unwrap();
    let how = Join { encrypts: true, ..launched(&server, &other, 2)(1) };
    let said = text(join(&how));
    assert!(said.contains("another job"), "{said}");
    server.shutdown();
}

#[test]
fn whoever_encrypts_is_not_taken_where_that_is_not_asked_for() {
    let _alone = alone();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret, 2, 500);
    let how = Join { encrypts: true, start_timeout_ms: 500, ..launched(&server, &secret, 2)(1) };
    let said = text(join(&how));
    assert!(said.contains("CAROLE_ENCRYPT=1") && said.contains("does not encrypt"), "{said}");
    server.shutdown();
}

#[test]
fn init_after_shutdown_works_any_number_of_times() {
    let _alone = alone();
    let job = unique("again");
    let before = descriptors();
    for epoch in 0..20 {
        let joined = join_all(3, |rank| Join { epoch: Epoch(epoch), ..private(&job, 3)(rank) });
        assert!(joined.iter().all(|j| j.as_ref().unwrap().table.epoch == Epoch(epoch)));
        stop(mesh(joined, options(Choice::Auto, 1), "shm"));
    }
    assert_eq!(descriptors(), before, "descriptors leak");
}

fn launcher(secret: &Secret, size: u32, timeout_ms: u64) -> Server {
    Server::start(ServerOptions {
        bind: Bind::Loopback(0),
        secret: secret.clone(),
        size,
        epoch: Epoch(0),
        once: false,
        start_timeout_ms: timeout_ms,
        publish: None,
        warn: quiet(),
    })
    .unwrap()
}

fn launched(server: &Server, secret: &Secret, size: u32) -> impl Fn(u32) -> Join + Sync + use<> {
    let address = format!("tcp://{}", server.addresses()[0]);
    let secret = secret.clone();
    move |rank| Join {
        secret: Some(secret.clone()),
        ..Join::new(rank_environment(rank, size, &[("CAROLE_RENDEZVOUS", &address)]), Epoch(0), quiet())
    }
}

#[test]
fn the_launchers_service_serves_epoch_after_epoch() {
    let _alone = alone();
    let before = descriptors();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret, 3, 20_000);
    for epoch in 0..4 {
        let config = launched(&server, &secret, 3);
        let joined = join_all(3, |rank| Join { epoch: Epoch(epoch), ..config(rank) });
        stop(mesh(joined, options(Choice::Tcp, 2), "tcp"));
    }
    let error = text(join(&launched(&server, &secret, 3)(1)));
    assert!(error.contains("epoch 0 of this job has already begun") && error.contains("rank 1"), "{error}");
    server.shutdown();
    assert_eq!(descriptors(), before, "descriptors leak");
}

#[test]
fn a_file_is_written_found_and_removed_even_over_a_stale_one() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("meet");
    // An earlier job's file: its address belongs to somebody who speaks, but not this language.
    let stranger = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let stale = format!("carole rendezvous 1\njob 00\nepoch 0\naddress {}\n", stranger.local_addr().unwrap());
    std::fs::write(&path, stale).unwrap();
    std::thread::spawn(move || {
        for stream in stranger.incoming().take(2) {
            let _ = stream.unwrap().write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n");
        }
    });
    let file = secret_file(&Secret::mint().unwrap());
    let (meet, secret) = (format!("file://{}", path.display()), file.path().display().to_string());
    let config = |rank| {
        let more = [("CAROLE_RENDEZVOUS", meet.as_str()), ("CAROLE_SECRET_FILE", secret.as_str())];
        Join::new(rank_environment(rank, 3, &more), Epoch(0), quiet())
    };
    let joined = std::thread::scope(|scope| {
        let early: Vec<_> = [1, 2].map(|rank| scope.spawn(move || join(&config(rank)))).into_iter().collect();
        std::thread::sleep(Duration::from_millis(300));
        let mut all = vec![join(&config(0))];
        all.extend(early.into_iter().map(|thread| thread.join().unwrap()));
        all
    });
    stop(mesh(joined, options(Choice::Tcp, 1), "tcp"));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn arguments_of_init_and_lines_of_a_file_reach_the_rendezvous() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let secret = secret_file(&Secret::mint().unwrap());
    let knobs = directory.path().join("knobs");
    let meet = format!("file://{}/meet", directory.path().display());
    // The variables name a port that nobody serves, and no secret.
    let port = free_port("127.0.0.1").to_string();
    std::fs::write(&knobs, format!("secret_file = {}\nhost_id = of the file\n", secret.path().display()))
        .unwrap();
    let joined = join_all(2, |rank| {
        let own = environment(&[
            ("CAROLE_CONFIG_FILE", knobs.to_str().unwrap()),
            ("CAROLE_RENDEZVOUS", &format!("127.0.0.1:{port}")),
            ("CAROLE_START_TIMEOUT_S", "20"),
            ("HOROVOD_RANK", &rank.to_string()),
        ]);
        // By field, as Python's keywords are, and by variable.
        let init = [("rendezvous".to_owned(), meet.clone()), ("CAROLE_SIZE".to_owned(), "2".to_owned())];
        let (config, _) = Config::load(&init, own.clone().into_iter()).unwrap();
        Join::from_config(&config, own.into_iter(), Epoch(0), quiet())
    });
    for joined in joined {
        let joined = joined.unwrap();
        assert!(joined.table.cards.iter().all(|card| card.host_id == "of the file"));
        let job = Secret::from_file(secret.path()).unwrap().job();
        assert_eq!(joined.table.job, job, "the secret is the file's");
    }
}

#[test]
fn rank_zero_serves_at_a_given_address_of_either_family() {
    let _alone = alone();
    for host in ["127.0.0.1", "::1"] {
        let port = free_port(host);
        let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let file = secret_file(&Secret::mint().unwrap());
        let secret = file.path().display().to_string();
        let more = [("CAROLE_RENDEZVOUS", address.as_str()), ("CAROLE_SECRET_FILE", secret.as_str())];
        let joined = join_all(2, |rank| Join::new(rank_environment(rank, 2, &more), Epoch(0), quiet()));
        stop(mesh(joined, options(Choice::Tcp, 1), "tcp"));
    }
}

#[test]
fn a_port_in_use_is_named() {
    let _alone = alone();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let config = Join {
        secret: Some(Secret::mint().unwrap()),
        ..Join::new(rank_environment(0, 2, &[("CAROLE_RENDEZVOUS", &address)]), Epoch(0), quiet())
    };
    let error = text(join(&config));
    assert!(
        error.contains("is in use") && error.contains(&taken.local_addr().unwrap().port().to_string()),
        "{error}"
    );
}

#[test]
fn links_over_ipv6() {
    let _alone = alone();
    let joined = join_all(3, private(&unique("six"), 3));
    let joined = joined
        .into_iter()
        .map(|joined| {
            let mut joined = joined.unwrap();
            let mut table = (*joined.table).clone();
            for card in &mut table.cards {
                card.addresses.retain(SocketAddr::is_ipv6);
                assert!(!card.addresses.is_empty(), "this host has ::1");
            }
            joined.table = Arc::new(table);
            Ok(joined)
        })
        .collect();
    stop(mesh(joined, options(Choice::Tcp, 2), "tcp"));
}

#[test]
fn missing_ranks_are_named_on_every_rank_that_came() {
    let _alone = alone();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret, 5, 700);
    let config = launched(&server, &secret, 5);
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = [0, 3]
            .map(|rank| {
                scope.spawn({
                    let c = config(rank);
                    move || join(&c)
                })
            })
            .into_iter()
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for result in results {
        let error = text(result);
        assert!(error.contains("ranks 1, 2, 4 of 5 did not arrive"), "{error}");
    }
    // One of the missing comes late and learns at once.
    let error = text(join(&config(1)));
    assert!(error.contains("ranks 1, 2, 4 of 5 did not arrive"), "{error}");
}

#[test]
fn knobs_that_differ_are_named_with_ranks_and_values() {
    let _alone = alone();
    let job = unique("knobs");
    let results = join_all(3, |rank| {
        let value = if rank == 1 { "ring" } else { "tree" };
        Join { knobs: vec![("CAROLE_ALGORITHM".into(), value.into())], ..private(&job, 3)(rank) }
    });
    for result in results {
        let error = text(result);
        assert!(error.contains("CAROLE_ALGORITHM must be the same on all ranks"), "{error}");
        assert!(error.contains("'ring' on rank 1") && error.contains("'tree' on ranks 0, 2"), "{error}");
    }
}

#[test]
fn two_processes_of_one_rank_are_both_named() {
    let _alone = alone();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret, 2, 1500);
    let config = launched(&server, &secret, 2);
    let errors: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn({
                    let c = config(1);
                    move || join(&c)
                })
            })
            .collect();
        threads.into_iter().map(|t| text(t.join().unwrap())).collect()
    });
    assert!(errors.iter().any(|e| e.contains("two processes claim rank 1")), "{errors:?}");
    assert!(errors.iter().any(|e| e.contains("rank 0 of 2 did not arrive")), "{errors:?}");
}

#[test]
fn a_wrong_secret_is_told_at_once_and_disturbs_nobody() {
    let _alone = alone();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret, 2, 20_000);
    let config = launched(&server, &secret, 2);
    let stranger = Join { secret: Some(Secret::mint().unwrap()), ..config(1) };
    let error = text(join(&stranger));
    assert!(error.contains("another job") && error.contains("secret"), "{error}");
    stop(mesh(join_all(2, config), options(Choice::Auto, 1), "shm"));
}

#[test]
fn scans_garbage_and_half_open_connections_disturb_neither_service_nor_links() {
    let _alone = alone();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret, 3, 20_000);
    let hold = |address: SocketAddr, silent: usize| -> Vec<TcpStream> {
        let mut open = Vec::new();
        for i in 0..silent + 20 {
            let Ok(mut stream) = TcpStream::connect(address) else { continue };
            match i % 4 {
                0 => {
                    drop(stream.write_all(b"GET / HTTP/1.1\r\n\r\n and much more garbage than a prefix has"))
                }
                1 => drop(stream.write_all(b"\x93carole\n\x01\0\0\0\xff\xff\xff\xff")),
                2 => drop(stream.write_all(b"\x93car")),
                _ => {}
            }
            open.push(stream);
        }
        open
    };
    let _held = hold(server.addresses()[0], 100);
    let joined = join_all(3, launched(&server, &secret, 3));
    let doors: Vec<SocketAddr> =
        joined.iter().flat_map(|j| j.as_ref().unwrap().doors.addresses.clone()).collect();
    let held: Vec<_> = doors.iter().map(|door| hold(*door, 70)).collect();
    stop(mesh(joined, options(Choice::Tcp, 2), "tcp"));
    drop(held);
}

#[test]
fn garbage_gets_no_answer() {
    let _alone = alone();
    let secret = Secret::mint().unwrap();
    let server = launcher(&secret, 2, 20_000);
    let mut stream = TcpStream::connect(server.addresses()[0]).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.is_empty());
}
