// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/checkpoint-restore/go-criu/v7/stats"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/cohort-project/cohort/runtime/criu/criutest"
	"github.com/cohort-project/cohort/runtime/memory/engine"
	"github.com/cohort-project/cohort/runtime/memory/pages"
)

const limit = 2 * time.Minute

func needRoot(t *testing.T, tools ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		missing(t, "root")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			missing(t, tool)
		}
	}
}

func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("COHORT_REQUIRE") == "1" {
		t.Fatalf("missing: %s", what)
	}
	t.Skipf("missing: %s", what)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// alone is a process of the host as a container that has no namespaces.
func alone(pid int) *Container {
	c := &Container{ID: "test", InitPid: pid}
	c.Config.Rootfs = "/"
	return c
}

func TestARoundAsksForTrackingAndNamesItsParent(t *testing.T) {
	c := alone(os.Getpid())
	first, err := c.preDumpOptions(t.TempDir(), []string{"/outside"}, false)
	must(t, err)
	if !first.GetTrackMem() || first.ParentImg != nil || first.GetPreDumpMode() != rpc.CriuPreDumpMode_VM_READ || first.NotifyScripts != nil || first.FreezeCgroup != nil {
		t.Errorf("the first round: %v", first)
	}
	if !first.GetLeaveRunning() || first.GetPid() != int32(os.Getpid()) || first.GetNetworkLock() != rpc.CriuNetworkLockMethod_SKIP || len(first.ExtMnt) != 1 {
		t.Errorf("it is not of the same container: %v", first)
	}
	second, err := c.preDumpOptions(t.TempDir(), nil, true)
	must(t, err)
	if second.GetParentImg() != "parent" {
		t.Errorf("the second round: %v", second)
	}
	opts := &rpc.CriuOpts{}
	Config{}.addParent(opts)
	if opts.TrackMem != nil || opts.ParentImg != nil {
		t.Errorf("a dump without pre-dumps: %v", opts)
	}
	Config{PreDumped: true}.addParent(opts)
	if !opts.GetTrackMem() || opts.GetParentImg() != "parent" {
		t.Errorf("a dump after pre-dumps: %v", opts)
	}
}

func TestWhatCRIUCountedIsRead(t *testing.T) {
	dir := t.TempDir()
	b, err := proto.Marshal(&stats.StatsEntry{Dump: &stats.DumpStatsEntry{
		FreezingTime: proto.Uint32(1), FrozenTime: proto.Uint32(2500), MemdumpTime: proto.Uint32(3), MemwriteTime: proto.Uint32(4),
		PagesScanned: proto.Uint64(100), PagesSkippedParent: proto.Uint64(60), PagesWritten: proto.Uint64(40), IrmapResolve: proto.Uint32(0), PagesLazy: proto.Uint64(0),
	}})
	must(t, err)
	var file []byte
	for _, n := range []int{stats.ImgServiceMagic, stats.StatsMagic, len(b)} {
		file = binary.LittleEndian.AppendUint32(file, uint32(n))
	}
	file = append(file, b...)
	path := filepath.Join(dir, "stats-dump")
	must(t, os.WriteFile(path, file, 0o600))
	r, err := readRound(dir)
	page := uint64(os.Getpagesize())
	if err != nil || r != (Round{Bytes: 40 * page, Skipped: 60 * page, Frozen: 2500 * time.Microsecond}) {
		t.Errorf("%+v, %v", r, err)
	}
	for _, cut := range []int{0, 4, 11} {
		must(t, os.WriteFile(path, file[:cut], 0o600))
		if _, err := readRound(dir); err == nil {
			t.Errorf("%d bytes were taken for statistics", cut)
		}
	}
	if _, err := readRound(t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// Rounds are made by hand here: what matters is where they are, and that a checkpoint
// will have no links in it.
func TestEachRoundIsBelowTheNextAndTheLastBelowTheDump(t *testing.T) {
	dir, images := t.TempDir(), t.TempDir()
	p, err := NewPreDumps(alone(os.Getpid()), "", nil, filepath.Join(dir, "pre-dump"))
	must(t, err)
	if err := p.Hand(images); err == nil {
		t.Error("handed over before there was a round")
	}
	for i := range 3 {
		must(t, os.Mkdir(p.next(), 0o700))
		must(t, p.stack())
		for _, name := range []string{fmt.Sprintf("round-%d.img", i), preDumpLog, "stats-dump"} {
			must(t, os.WriteFile(filepath.Join(p.next(), name), nil, 0o600))
		}
		must(t, p.accept())
	}
	must(t, p.Hand(images))
	must(t, p.Close())
	var found []string
	must(t, filepath.WalkDir(images, func(path string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(images, path)
		if found = append(found, rel); d.Type()&fs.ModeSymlink != 0 {
			t.Errorf("%s is a link", rel)
		}
		return err
	}))
	want := []string{".", "parent", "parent/parent", "parent/parent/parent", "parent/parent/parent/round-0.img", "parent/parent/round-1.img", "parent/round-2.img"}
	if !slices.Equal(found, want) {
		t.Errorf("found %v, want %v", found, want)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestAFailedRoundIsTheLast(t *testing.T) {
	p, err := NewPreDumps(alone(os.Getpid()), "", nil, filepath.Join(t.TempDir(), "pre-dump"))
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Round(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	// What it was to copy may be forgotten by the kernel.
	if _, err := p.Round(t.Context()); !errors.Is(err, context.Canceled) {
		t.Errorf("a round after one that failed: %v", err)
	}
	if err := p.Hand(t.TempDir()); err == nil {
		t.Error("handed over after a failure")
	}
}

func TestAKernelWithoutSoftDirtyIsToldByNameBeforeAnyTaskIsTouched(t *testing.T) {
	needRoot(t, "criu")
	if engine.Probe().SoftDirty {
		t.Skip("this kernel has soft-dirty bits")
	}
	cmd := exec.Command("sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	must(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	p, err := NewPreDumps(alone(cmd.Process.Pid), t.TempDir(), nil, filepath.Join(t.TempDir(), "pre-dump"))
	must(t, err)
	defer p.Close()
	_, err = p.Round(t.Context())
	if !errors.Is(err, ErrNoSoftDirty) || !strings.Contains(err.Error(), "CONFIG_MEM_SOFT_DIRTY") {
		t.Errorf("%v", err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil || !bytes.Contains(status, []byte("State:\tS (sleeping)")) || !bytes.Contains(status, []byte("TracerPid:\t0")) {
		t.Errorf("the process was touched: %v\n%s", err, status)
	}
}

// mutator is a program that changes its memory and knows what it must be, tracked by
// write protection (runtime/memory/pages/testdata/mutator.c).
type mutator struct {
	t      *testing.T
	cmd    *exec.Cmd
	pid    int
	result string
}

func gcc(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
}

func startMutator(t *testing.T, pages, steps int) *mutator {
	t.Helper()
	dir := t.TempDir()
	program := filepath.Join(dir, "mutator")
	gcc(t, "-O2", "-Wall", "-o", program, "../memory/pages/testdata/mutator.c")
	m := &mutator{t: t, result: filepath.Join(dir, "result")}
	m.cmd = exec.Command(program, fmt.Sprint(pages), fmt.Sprint(steps), m.result)
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	m.cmd.Dir = "/"
	stdout, err := m.cmd.StdoutPipe()
	must(t, err)
	must(t, m.cmd.Start())
	m.pid = m.cmd.Process.Pid
	t.Cleanup(m.kill)
	lines := bufio.NewReader(stdout)
	var fd int
	var start, size uint64
	if _, err := fmt.Fscan(lines, &fd, &start, &size); err != nil {
		missing(t, "userfaultfd with asynchronous write protection")
	}
	var status unix.WaitStatus
	for {
		if _, err = unix.Wait4(m.pid, &status, unix.WUNTRACED, nil); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	must(t, err)
	pidfd, err := unix.PidfdOpen(m.pid, 0)
	must(t, err)
	defer unix.Close(pidfd)
	uffd, err := unix.PidfdGetfd(pidfd, fd, 0)
	must(t, err)
	t.Cleanup(func() { unix.Close(uffd) })
	must(t, unix.Kill(m.pid, unix.SIGCONT))
	_, err = io.Copy(io.Discard, lines) // until it has closed its own
	must(t, err)
	return m
}

func (m *mutator) kill() {
	if m.cmd.ProcessState == nil {
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait()
	}
}

// plain expects what package oci expects of images: files of CRIU's names, and
// directories called parent.
func plain(t *testing.T, images string) {
	t.Helper()
	name := regexp.MustCompile(`^([a-z][a-z0-9_.-]*\.img|descriptors\.json|irmap-cache)$`)
	must(t, filepath.WalkDir(images, func(path string, d fs.DirEntry, err error) error {
		switch {
		case path == images:
		case d.IsDir() && d.Name() == ParentDir:
		case d.Type().IsRegular() && name.MatchString(d.Name()):
		default:
			t.Errorf("%s (%s) has no place in a checkpoint", path, d.Type())
		}
		return err
	}))
}

// The whole way with the real CRIU and a program that goes on writing, on a kernel that
// need not have soft-dirty bits.
func TestAProcessCopiedByPreDumpsIsRestoredByPlainCRIU(t *testing.T) {
	needRoot(t, "gcc", "criu")
	const size, steps, rounds = 6000, 10, 3
	t.Setenv("COHORT_CRIU", criutest.SoftDirty(t, func(what string) { missing(t, what) }))
	m := startMutator(t, size, steps)
	root, none := t.TempDir(), t.TempDir()
	images, work := filepath.Join(root, "checkpoint"), filepath.Join(root, "work")
	must(t, errors.Join(os.Mkdir(images, 0o700), os.Mkdir(work, 0o700)))
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	p, err := NewPreDumps(alone(m.pid), none, nil, filepath.Join(root, "pre-dump"))
	must(t, err)
	for i := range rounds {
		r, err := p.Round(ctx)
		must(t, err)
		t.Logf("round: %+v", r)
		if (i > 0) != (r.Skipped > 0) || r.Bytes == 0 || r.Frozen <= 0 {
			t.Errorf("round %d: %+v", i, r)
		}
		time.Sleep(20 * time.Millisecond) // it goes on writing
	}
	must(t, p.Hand(images))
	must(t, p.Close())

	d, err := Start(ctx, Config{Container: alone(m.pid), ImagesDir: images, WorkDir: work, PreDumped: true})
	must(t, err)
	must(t, unix.Kill(m.pid, unix.SIGSTOP))
	must(t, d.Finish(ctx, limit, Hooks{func() ([]int, error) { return nil, nil }, func() {}, func() error { return nil }}))
	skipped, err := SkippedBytes(work)
	must(t, err)
	total := int64(skipped)
	own, err := filepath.Glob(images + "/pages-*.img")
	must(t, err)
	for _, f := range own {
		fi, err := os.Stat(f)
		must(t, err)
		total += fi.Size()
	}
	t.Logf("%d bytes were left to the pre-dumps, of %d", skipped, total)
	if skipped < size/4*uint64(os.Getpagesize()) || int64(skipped) == total {
		t.Errorf("%d bytes of %d were left to the pre-dumps", skipped, total)
	}
	m.kill()
	plain(t, images)
	chain, err := pages.OpenChain([]string{images})
	if err != nil {
		t.Fatalf("the next epoch cannot build on it: %v", err)
	}
	must(t, chain.Close())

	cmd := exec.CommandContext(ctx, "criu", "restore", "--restore-detached", "--images-dir", images, "--work-dir", work, "--log-file", "restore.log",
		"--file-locks", "--link-remap", "--tcp-established", "--ext-unix-sk", "--manage-cgroups=ignore")
	if out, err := cmd.CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(work, "restore.log"))
		t.Fatalf("restore: %v\n%s\n%s", err, out, log[max(0, len(log)-4000):])
	}
	pidfd, err := unix.PidfdOpen(m.pid, 0)
	must(t, err)
	defer unix.Close(pidfd)
	defer func() { _ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0) }()
	must(t, unix.PidfdSendSignal(pidfd, unix.SIGUSR1, nil, 0))
	must(t, unix.PidfdSendSignal(pidfd, unix.SIGCONT, nil, 0))
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(limit.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			t.Fatalf("the restored program does not end: %v", err)
		}
		break
	}
	verdict, err := os.ReadFile(m.result)
	must(t, err)
	if t.Logf("%s", verdict); !strings.HasPrefix(string(verdict), "0 of ") {
		t.Error("its memory differs")
	}
}
