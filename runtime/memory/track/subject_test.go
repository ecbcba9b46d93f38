// SPDX-License-Identifier: Apache-2.0

package track

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// missing skips a test for want of something, or fails it where everything has to
// be there.
func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("COHORT_REQUIRE") == "1" {
		t.Fatalf("missing: %s", what)
	}
	t.Skipf("missing: %s", what)
}

var supportedHere = sync.OnceValue(Supported)

func needTracking(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "root")
	}
	if err := supportedHere(); err != nil {
		missing(t, err.Error())
	}
}

// built compiles a program of testdata once per test binary.
var built sync.Map

func build(t testing.TB, source string) string {
	t.Helper()
	if _, err := exec.LookPath("gcc"); err != nil {
		missing(t, "gcc")
	}
	once, _ := built.LoadOrStore(source, sync.OnceValues(func() (string, error) {
		dir, err := os.MkdirTemp("", "track")
		if err != nil {
			return "", err
		}
		if err := os.Chmod(dir, 0o755); err != nil {
			return "", err
		}
		program := filepath.Join(dir, strings.TrimSuffix(source, ".c"))
		out, err := exec.Command("gcc", "-O1", "-Wall", "-pthread", "-o", program, "testdata/"+source).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("%w: %s", err, out)
		}
		return program, nil
	}))
	program, err := once.(func() (string, error))()
	if err != nil {
		t.Fatalf("building %s: %v", source, err)
	}
	return program
}

func TestMain(m *testing.M) {
	code := m.Run()
	built.Range(func(_, once any) bool {
		if program, err := once.(func() (string, error))(); err == nil {
			os.RemoveAll(filepath.Dir(program))
		}
		return true
	})
	os.Exit(code)
}

// subject is a running testdata/subject.c.
type subject struct {
	t   testing.TB
	cmd *exec.Cmd
	pid int
	in  io.WriteCloser
	out *bufio.Reader
}

func startSubject(t testing.TB, attr *syscall.SysProcAttr) *subject {
	t.Helper()
	needTracking(t)
	s := &subject{t: t, cmd: exec.Command(build(t, "subject.c"))}
	if attr == nil {
		attr = &syscall.SysProcAttr{}
	}
	s.cmd.SysProcAttr = attr
	s.cmd.Stderr = os.Stderr
	in, err := s.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.in, s.out = in, bufio.NewReader(out)
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.pid = s.cmd.Process.Pid
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
	})
	s.answer("start")
	return s
}

// do has the subject run one command and returns the numbers of its answer.
func (s *subject) do(format string, args ...any) []uint64 {
	s.t.Helper()
	numbers, err := s.try(format, args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return numbers
}

func (s *subject) try(format string, args ...any) ([]uint64, error) {
	s.t.Helper()
	line := fmt.Sprintf(format, args...)
	if _, err := io.WriteString(s.in, line+"\n"); err != nil {
		s.t.Fatalf("%s: %v", line, err)
	}
	return s.read(line)
}

func (s *subject) answer(line string) []uint64 {
	s.t.Helper()
	numbers, err := s.read(line)
	if err != nil {
		s.t.Fatal(err)
	}
	return numbers
}

func (s *subject) read(line string) ([]uint64, error) {
	s.t.Helper()
	text, err := s.out.ReadString('\n')
	if err != nil {
		s.t.Fatalf("the subject died of %q: %v", line, err)
	}
	fields := strings.Fields(text)
	if fields[0] != "ok" {
		return nil, fmt.Errorf("subject: %s: %s", line, strings.TrimSpace(text))
	}
	var numbers []uint64
	for _, f := range fields[1:] {
		n, err := strconv.ParseUint(f, 10, 64)
		if err != nil {
			s.t.Fatalf("subject: %s: %s", line, text)
		}
		numbers = append(numbers, n)
	}
	return numbers, nil
}

// mapping makes one in a slot.
func (s *subject) mapping(slot, pages int, kind string, path ...string) Range {
	s.t.Helper()
	return asRange(s.do("map %d %d %s %s", slot, pages, kind, strings.Join(path, "")))
}

func asRange(numbers []uint64) Range { return Range{numbers[0], numbers[0] + numbers[1]} }

func (s *subject) attach() *Tracker {
	s.t.Helper()
	return attachTo(s.t, s.pid)
}

func attachTo(t testing.TB, pid int) *Tracker {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	tr, err := Attach(ctx, pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.Close() })
	return tr
}

// trackedSubject is a subject with one mapping, in slot 0, whose pages have all been
// written to and taken by its tracker.
func trackedSubject(t testing.TB, pages int) (*subject, Range, *Tracker) {
	t.Helper()
	s := startSubject(t, nil)
	m := s.mapping(0, pages, "anon")
	s.do("fill 0 1")
	tr := s.attach()
	taken(t, tr, m)
	return s, m, tr
}

func ignore(Range) error { return nil }

// pageSet collects what a tracker reports of one range, as page numbers within it.
type pageSet map[int]bool

func pagesOf(t testing.TB, within Range, report func(func(Range) error) error) pageSet {
	t.Helper()
	set := pageSet{}
	last := uint64(0)
	err := report(func(r Range) error {
		if r.Start < last || r.End <= r.Start || r.Start%pageSize != 0 || r.End%pageSize != 0 {
			return fmt.Errorf("range %#x-%#x is out of order or odd", r.Start, r.End)
		}
		last = r.End
		for at := max(r.Start, within.Start); at < min(r.End, within.End); at += pageSize {
			set[int((at-within.Start)/pageSize)] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func taken(t testing.TB, tr *Tracker, within Range) pageSet {
	t.Helper()
	return pagesOf(t, within, func(fn func(Range) error) error { return tr.Take(context.Background(), fn) })
}

func clean(t testing.TB, tr *Tracker, within Range) pageSet {
	t.Helper()
	asked := func(alone uint64) pageSet {
		defer func(a uint64) { tr.alone = a }(tr.alone)
		tr.alone = alone
		return pagesOf(t, within, func(fn func(Range) error) error { return tr.Clean(fn, ignore) })
	}
	// What is clean, and what is left when all that is not is taken away.
	direct, rest := asked(math.MaxUint64), asked(0)
	expect(t, "Clean, by what is not", rest, direct)
	return direct
}

func refresh(t testing.TB, tr *Tracker) int {
	t.Helper()
	added, err := tr.Refresh(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return added
}

// pages is the set from..to, to excluded.
func pages(from, to int) pageSet {
	set := pageSet{}
	for i := from; i < to; i++ {
		set[i] = true
	}
	return set
}

func expect(t testing.TB, what string, got, want pageSet) {
	t.Helper()
	same := len(got) == len(want)
	for p := range want {
		same = same && got[p]
	}
	if !same {
		t.Errorf("%s: pages %v, want %v", what, got.list(), want.list())
	}
}

func (s pageSet) list() []string {
	top := -1
	for p := range s {
		top = max(top, p)
	}
	var runs []string
	for i := 0; i <= top; i++ {
		if !s[i] {
			continue
		}
		from := i
		for s[i+1] {
			i++
		}
		runs = append(runs, fmt.Sprintf("%d-%d", from, i))
	}
	return runs
}

// untrackedWhy is the reason that the tracker gives for a range; empty if it tracks it.
func untrackedWhy(tr *Tracker, r Range) string {
	for _, m := range tr.Untracked() {
		if overlap(m.Range, r) > 0 {
			return m.Why
		}
	}
	return ""
}

func isTracked(tr *Tracker, r Range) bool {
	var n uint64
	for _, c := range tr.Tracked() {
		n += overlap(c, r)
	}
	return n == r.Size()
}

func procPath(pid int, name string) string { return fmt.Sprintf("/proc/%d/%s", pid, name) }
