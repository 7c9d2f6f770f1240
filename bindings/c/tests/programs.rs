//! The C programs, compiled as C99 and as C++, against the shared and the static library, on 1, 2 and 3 ranks.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-pedantic", "-Werror"];
/// What the standard library needs of a program that links it statically.
const STATIC_LIBRARIES: [&str; 5] = ["-lgcc_s", "-lpthread", "-lm", "-ldl", "-lc"];

/// Builds the two libraries and tells where they are. Cargo does not tell tests where a cdylib went.
fn libraries() -> PathBuf {
    let mut build = Command::new(env!("CARGO"));
    // With the tests, so that dependencies have the same features and are not built again.
    build.args(["build", "-p", "carole-c", "--lib", "--tests"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    let built = build.output().expect("cargo runs");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    // This test lies in <target>/<profile>/deps.
    let test = std::env::current_exe().expect("a test knows where it lies");
    let profile = test.ancestors().nth(2).expect("tests lie in deps").to_path_buf();
    assert!(profile.join("libcarole.so").exists(), "no libcarole.so in {}", profile.display());
    profile
}

#[derive(Clone, Copy)]
enum Link {
    Shared,
    Static,
}

fn compile(source: &str, compiler: &str, flags: &[&str], link: Link, out: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let libraries = libraries();
    let mut command = Command::new(compiler);
    command.args(flags).args(WARNINGS).arg("-I").arg(root).arg("-o").arg(out);
    if compiler == "c++" {
        command.args(["-x", "c++"]);
    }
    command.arg(root.join(source));
    if compiler == "c++" {
        command.args(["-x", "none"]);
    }
    match link {
        Link::Shared => {
            // The SONAME carries the major version; an installed library has this link beside it.
            let versioned = out.with_file_name("libcarole.so.0");
            let _ = std::fs::remove_file(&versioned);
            std::fs::copy(libraries.join("libcarole.so"), &versioned).expect("the library can be copied");
            command.arg(&versioned).arg("-Wl,-rpath,$ORIGIN");
        }
        Link::Static => {
            command.arg(libraries.join("libcarole.a")).args(STATIC_LIBRARIES);
        }
    }
    let compiled = command.output().expect("the compiler runs");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
}

/// Runs a program on `size` ranks of this host, with plain variables and no launcher.
fn run(program: &Path, size: usize) {
    // Named after the program's folder, which is nobody else's.
    let job = format!("{}-{size}", program.display()).replace('/', "-");
    let ranks: Vec<Child> = (0..size)
        .map(|rank| {
            Command::new(program)
                .env("CAROLE_RANK", rank.to_string())
                .env("CAROLE_SIZE", size.to_string())
                .env("CAROLE_LOCAL_RANK", rank.to_string())
                .env("CAROLE_LOCAL_SIZE", size.to_string())
                .env("CAROLE_JOB", &job)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("the program starts")
        })
        .collect();
    for (rank, child) in ranks.into_iter().enumerate() {
        let Output { status, stdout, stderr } = child.wait_with_output().expect("the program ends");
        assert!(
            status.success(),
            "rank {rank} of {size}: {status}\n{}{}",
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr)
        );
        assert!(stderr.is_empty(), "silent unless asked: {}", String::from_utf8_lossy(&stderr));
    }
}

fn compile_and_run(source: &str, compiler: &str, flags: &[&str], link: Link) {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let program = scratch.path().join("program");
    compile(source, compiler, flags, link, &program);
    for size in [1, 2, 3] {
        run(&program, size);
    }
}

#[test]
fn every_call_from_c99_with_the_shared_library() {
    compile_and_run("tests/collectives.c", "cc", &["-std=c99"], Link::Shared);
}

#[test]
fn every_call_from_cpp_with_the_static_library() {
    compile_and_run("tests/collectives.c", "c++", &["-std=c++11"], Link::Static);
}

#[test]
fn the_example_from_c99_with_the_static_library() {
    compile_and_run("examples/allreduce.c", "cc", &["-std=c99"], Link::Static);
}

#[test]
fn the_shared_library_exports_its_interface_and_nothing_else() {
    let listed = Command::new("nm")
        .args(["-D", "--defined-only", "--format=posix"])
        .arg(libraries().join("libcarole.so"))
        .output()
        .expect("nm runs");
    let text = String::from_utf8(listed.stdout).expect("names are text");
    let names: Vec<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(names.contains(&"carole_allreduce"), "{names:?}");
    let foreign: Vec<_> = names.iter().filter(|name| !name.starts_with("carole_")).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
    let soname = Command::new("readelf")
        .arg("-d")
        .arg(libraries().join("libcarole.so"))
        .output()
        .expect("readelf runs");
    assert!(String::from_utf8_lossy(&soname.stdout).contains("[libcarole.so.0]"));
}
