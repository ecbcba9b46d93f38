// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	storage "github.com/cohort-project/cohort/api/storage/v1"
)

// The test binary is cohortd when this is set: what is tested is the process, its
// signals and its end.
const beDaemon = "COHORTD_TEST_IS_COHORTD"

func TestMain(m *testing.M) {
	if os.Getenv(beDaemon) == "1" {
		main()
		return
	}
	os.Exit(m.Run())
}

// deadline bounds every wait in these tests.
const deadline = 30 * time.Second

func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("COHORT_REQUIRE") == "1" {
		t.Fatalf("required by COHORT_REQUIRE=1 and missing: %s", what)
	}
	t.Skip("missing: " + what)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// process is a running cohortd.
type process struct {
	t    *testing.T
	root string
	cmd  *exec.Cmd
	log  *bytes.Buffer
	done bool
}

func cohortd(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), beDaemon+"=1")
	return cmd
}

// newRoot returns a root on a file system without shared extents. At the end its image is
// unmounted, also after a failure.
func newRoot(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "root")
	}
	root := filepath.Join(t.TempDir(), "root")
	t.Cleanup(func() {
		if out, err := cohortd(t, "umount", "--root", root).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
			_ = unix.Unmount(root, unix.MNT_DETACH)
		}
	})
	return root
}

// run starts cohortd and waits until it says, as to systemd, that it is ready.
func run(t *testing.T, root string, args ...string) *process {
	t.Helper()
	notify := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	must(t, err)
	defer l.Close()
	p := &process{t: t, root: root, log: &bytes.Buffer{}}
	p.cmd = cohortd(t, append([]string{"--root", root}, args...)...)
	p.cmd.Env = append(p.cmd.Env, "NOTIFY_SOCKET="+notify)
	p.cmd.Stderr = p.log
	must(t, p.cmd.Start())
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("cohortd said:\n%s", p.log)
		}
	})
	must(t, l.SetReadDeadline(time.Now().Add(deadline)))
	buf := make([]byte, 64)
	n, err := l.Read(buf)
	if err != nil || string(buf[:n]) != "READY=1" {
		t.Fatalf("not ready: %q, %v\n%s", buf[:n], err, p.log)
	}
	return p
}

func (p *process) kill() {
	if p.done {
		return
	}
	p.done = true
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// stop ends cohortd as a service manager does.
func (p *process) stop() {
	p.t.Helper()
	p.done = true
	must(p.t, p.cmd.Process.Signal(syscall.SIGTERM))
	timer := time.AfterFunc(deadline, func() { _ = p.cmd.Process.Kill() })
	defer timer.Stop()
	if err := p.cmd.Wait(); err != nil {
		p.t.Fatalf("after SIGTERM: %v\n%s", err, p.log)
	}
}

func (p *process) snapshotter() snapshots.Snapshotter {
	p.t.Helper()
	conn, err := grpc.NewClient("unix://"+filepath.Join(p.root, "snapshotter.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(p.t, err)
	p.t.Cleanup(func() { conn.Close() })
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "cohort")
}

func (p *process) storage() storage.StorageService {
	p.t.Helper()
	conn, err := net.Dial("unix", filepath.Join(p.root, "host.sock"))
	must(p.t, err)
	c := ttrpc.NewClient(conn)
	p.t.Cleanup(func() { c.Close() })
	return storage.NewStorageClient(c)
}

func ctxFor(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	t.Cleanup(cancel)
	return ctx
}

func requireImage(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("mkfs.btrfs"); err != nil {
		missing(t, "mkfs.btrfs")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		missing(t, "/dev/loop-control")
	}
}

// upperOf finds the upper directory as the shim does.
func upperOf(t *testing.T, m []mount.Mount) string {
	t.Helper()
	for _, o := range m[0].Options {
		if v, ok := strings.CutPrefix(o, "upperdir="); ok {
			return v
		}
	}
	return m[0].Source
}

// The whole way, as containers, containerd and the shim go it: an image made by
// itself, a layer, a container with a mount and running writers, a kill, a restart that
// takes everything over, a capture, its adoption, and the end without a trace.
func TestDaemonIsKilledUnderARunningContainerAndNothingIsLost(t *testing.T) {
	requireImage(t)
	root := newRoot(t)
	ctx := ctxFor(t)
	p := run(t, root)
	sn := p.snapshotter()
	_, err := sn.Prepare(ctx, "unpack", "")
	must(t, err)
	must(t, sn.Commit(ctx, "base", "unpack"))
	m, err := sn.Prepare(ctx, "container", "base")
	must(t, err)
	rootfs := t.TempDir()
	must(t, mount.All(m, rootfs))
	defer func() { _ = unix.Unmount(rootfs, 0) }()
	must(t, os.WriteFile(filepath.Join(rootfs, "before"), []byte("1"), 0o600))

	// A capture that is never sealed.
	const lost = "00000000000000000000000000000001"
	_, err = p.storage().Open(ctx, &storage.OpenRequest{Id: lost, Upperdir: upperOf(t, m), LeaseMs: 60000})
	must(t, err)
	_, err = p.storage().Take(ctx, &storage.CaptureRequest{Id: lost})
	must(t, err)

	p.kill()
	must(t, os.WriteFile(filepath.Join(rootfs, "meanwhile"), []byte("2"), 0o600))
	p = run(t, root)
	sn = p.snapshotter()
	st := p.storage()

	info, err := sn.Stat(ctx, "container")
	must(t, err)
	again, err := sn.Mounts(ctx, "container")
	must(t, err)
	if info.Kind != snapshots.KindActive || fmt.Sprint(again) != fmt.Sprint(m) {
		t.Errorf("after the restart: %v, %v; before: %v", info.Kind, again, m)
	}
	list, err := st.List(ctx, &storage.Empty{})
	must(t, err)
	if left, _ := filepath.Glob(root + "/captures/*"); len(left)+len(list.GetCaptures()) > 0 {
		t.Errorf("the unsealed capture survived: %v, %v", left, list.GetCaptures())
	}

	const id = "0123456789abcdef0123456789abcdef"
	opened, err := st.Open(ctx, &storage.OpenRequest{Id: id, Upperdir: upperOf(t, m), LeaseMs: 60000, Labels: map[string]string{"a": "b"}})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(opened.GetDir(), "checkpoint/config.dump"), []byte("{}"), 0o600))
	took, err := st.Take(ctx, &storage.CaptureRequest{Id: id})
	must(t, err)
	if took.GetTookNs() <= 0 {
		t.Error("no time reported")
	}
	sealed, err := st.Seal(ctx, &storage.SealRequest{Id: id})
	must(t, err)
	if sealed.GetStorageBytes() != 2 {
		t.Errorf("%d bytes of storage, wrote 2", sealed.GetStorageBytes())
	}

	// Sealed captures survive, unlike the others.
	p.kill()
	p = run(t, root)
	sn, st = p.snapshotter(), p.storage()
	list, err = st.List(ctx, &storage.Empty{})
	must(t, err)
	if c := list.GetCaptures(); len(c) != 1 || c[0].GetId() != id || c[0].GetState() != "sealed" || c[0].GetLabels()["a"] != "b" {
		t.Errorf("captures after a restart: %v", c)
	}
	_, err = sn.Prepare(ctx, "adopted", "base", snapshots.WithLabels(map[string]string{"containerd.io/snapshot/cohort.adopt-fs": id}))
	must(t, err)
	must(t, sn.Commit(ctx, "layer", "adopted"))
	v, err := sn.View(ctx, "view", "layer")
	must(t, err)
	view := t.TempDir()
	must(t, mount.All(v, view))
	for name, want := range map[string]string{"before": "1", "meanwhile": "2"} {
		if got, err := os.ReadFile(filepath.Join(view, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	must(t, unix.Unmount(view, 0))

	p.stop()
	for _, s := range []string{"host.sock", "snapshotter.sock"} {
		if _, err := os.Lstat(filepath.Join(root, s)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", s, err)
		}
	}
	// The container still runs on it.
	if out, err := cohortd(t, "umount", "--root", root).CombinedOutput(); err == nil || !strings.Contains(string(out), rootfs) {
		t.Errorf("unmounted under a container: %v, %s", err, out)
	}
	must(t, os.WriteFile(filepath.Join(rootfs, "still"), nil, 0o600))
	must(t, unix.Unmount(rootfs, 0))
	if out, err := cohortd(t, "umount", "--root", root).CombinedOutput(); err != nil {
		t.Fatalf("umount: %v, %s", err, out)
	}
	// A mount namespace that somebody made at this moment holds a copy of the mount,
	// and the kernel lets go of the device when the last one is gone.
	deadline := time.Now().Add(10 * time.Second)
	for {
		left := attachedTo(t, root)
		if left == "" {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("the image is still attached to %s", left)
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	// And all of it comes back.
	p = run(t, root)
	if _, err := p.snapshotter().Stat(ctx, "layer"); err != nil {
		t.Error(err)
	}
	p.stop()
}

// With the image unmounted but held by a container's mount, a second file system on the
// same image would destroy it: the start must find the first.
func TestImageIsNeverAttachedTwice(t *testing.T) {
	requireImage(t)
	root := newRoot(t)
	ctx := ctxFor(t)
	p := run(t, root)
	sn := p.snapshotter()
	_, err := sn.Prepare(ctx, "unpack", "")
	must(t, err)
	must(t, sn.Commit(ctx, "base", "unpack"))
	m, err := sn.Prepare(ctx, "container", "base")
	must(t, err)
	rootfs := t.TempDir()
	must(t, mount.All(m, rootfs))
	defer func() { _ = unix.Unmount(rootfs, 0) }()
	p.stop()
	must(t, unix.Unmount(root, unix.MNT_DETACH))

	p = run(t, root)
	must(t, os.WriteFile(filepath.Join(rootfs, "f"), []byte("x"), 0o600))
	// What the old mount wrote is in the new one, so they are one file system.
	if got, err := os.ReadFile(filepath.Join(upperOf(t, m), "f")); err != nil || string(got) != "x" {
		t.Errorf("two file systems on one image: %q, %v", got, err)
	}
	must(t, unix.Unmount(rootfs, 0))
	p.stop()
}

func TestWithoutToolsTheCopyBackendServesAndSaysWhy(t *testing.T) {
	root := newRoot(t)
	t.Setenv("PATH", t.TempDir())
	p := run(t, root)
	info, err := p.storage().Info(ctxFor(t), &storage.Empty{})
	must(t, err)
	if info.GetBackend() == "reflink" || info.GetBackend() == "btrfs" {
		t.Skipf("the temporary directory's file system has %s", info.GetBackend())
	}
	if info.GetBackend() != "copy" || info.GetRoot() != root || info.GetFreeBytes() == 0 || info.GetSnapshotterAddress() != filepath.Join(root, "snapshotter.sock") {
		t.Errorf("info %v", info)
	}
	p.stop()
	if !strings.Contains(p.log.String(), "apt install btrfs-progs") {
		t.Errorf("the cure is not named:\n%s", p.log)
	}
	out, err := cohortd(t, "--root", root, "--backend", "btrfs").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "empty root") {
		t.Errorf("btrfs mounted over the snapshots of copy: %v, %s", err, out)
	}
}

func TestOneDaemonPerRoot(t *testing.T) {
	root := newRoot(t)
	p := run(t, root, "--backend", "copy")
	out, err := cohortd(t, "--root", root, "--backend", "copy").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another cohortd uses") {
		t.Errorf("a second one started: %v, %s", err, out)
	}
	p.stop()
}

func TestSocketsAreForRootAndReplacedOnlyWhenStale(t *testing.T) {
	root := newRoot(t)
	p := run(t, root, "--backend", "copy")
	for _, s := range []string{"host.sock", "snapshotter.sock"} {
		fi, err := os.Lstat(filepath.Join(root, s))
		must(t, err)
		if fi.Mode() != os.ModeSocket|0o600 {
			t.Errorf("%s has mode %v", s, fi.Mode())
		}
	}
	p.kill() // leaves the sockets
	p = run(t, root, "--backend", "copy")
	p.stop()

	elsewhere := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", elsewhere)
	must(t, err)
	defer l.Close()
	out, err := cohortd(t, "--root", root, "--backend", "copy", "--address", elsewhere).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another process listens") {
		t.Errorf("a socket in use was replaced: %v, %s", err, out)
	}
	file := filepath.Join(t.TempDir(), "f")
	must(t, os.WriteFile(file, []byte("precious"), 0o600))
	out, err = cohortd(t, "--root", root, "--backend", "copy", "--address", file).CombinedOutput()
	if got, _ := os.ReadFile(file); err == nil || string(got) != "precious" {
		t.Errorf("a file was replaced: %v, %s", err, out)
	}
}

func TestErrorsKeepTheirClassOverTheWire(t *testing.T) {
	root := newRoot(t)
	p := run(t, root, "--backend", "copy")
	st, ctx := p.storage(), ctxFor(t)
	for _, c := range []struct {
		what string
		err  func() error
		is   func(error) bool
	}{
		{"unknown capture", func() error {
			_, err := st.Seal(ctx, &storage.SealRequest{Id: strings.Repeat("0", 32)})
			return err
		}, errdefs.IsNotFound},
		{"bad id", func() error {
			_, err := st.Discard(ctx, &storage.CaptureRequest{Id: "../../etc"})
			return err
		}, errdefs.IsInvalidArgument},
		{"foreign directory", func() error {
			_, err := st.Open(ctx, &storage.OpenRequest{Id: strings.Repeat("0", 32), Upperdir: "/etc"})
			return err
		}, errdefs.IsInvalidArgument},
	} {
		if err := errgrpc.ToNative(c.err()); !c.is(err) {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	if _, err := st.Discard(ctx, &storage.CaptureRequest{Id: strings.Repeat("0", 32)}); err != nil {
		t.Errorf("discarding nothing: %v", err)
	}
	p.stop()
}

func TestMetricsTellBackendAndCaptures(t *testing.T) {
	root := newRoot(t)
	l, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free now
	must(t, err)
	addr := l.Addr().String()
	must(t, l.Close())
	p := run(t, root, "--backend", "copy", "--metrics", addr)
	ctx := ctxFor(t)
	m, err := p.snapshotter().Prepare(ctx, "c", "")
	must(t, err)
	id := strings.Repeat("a", 32)
	_, err = p.storage().Open(ctx, &storage.OpenRequest{Id: id, Upperdir: upperOf(t, m)})
	must(t, err)
	_, err = p.storage().Take(ctx, &storage.CaptureRequest{Id: id})
	must(t, err)
	resp, err := http.Get("http://" + addr + "/metrics")
	must(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(t, err)
	for _, want := range []string{
		`cohort_storage_backend_info{backend="copy"} 1`, `cohort_storage_captures{state="taken"} 1`,
		`cohort_storage_snapshots{kind="Active"} 1`, "cohort_storage_take_seconds_count 1", "cohort_storage_free_bytes ",
	} {
		if !strings.Contains(string(body), want) {
			t.Errorf("missing %s", want)
		}
	}
	p.stop()
}

// attachedTo names a loop device whose file is the image of root; empty if none is.
func attachedTo(t *testing.T, root string) string {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	must(t, err)
	for _, f := range files {
		if b, _ := os.ReadFile(f); strings.HasPrefix(string(b), root) {
			return f
		}
	}
	return ""
}
