// SPDX-License-Identifier: Apache-2.0

package shm

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/memory/pages"
	"github.com/cohort-project/cohort/runtime/memory/track"
)

const criuLimit = 2 * time.Minute // of one CRIU run, on a busy machine

func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("COHORT_REQUIRE") == "1" {
		t.Fatalf("missing: %s", what)
	}
	t.Skipf("missing: %s", what)
}

func needRoot(t testing.TB, tools ...string) {
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

// subject is testdata/subject.c running.
type subject struct {
	t   testing.TB
	cmd *exec.Cmd
	pid int
}

func start(t testing.TB, args ...string) *subject {
	t.Helper()
	program := filepath.Join(t.TempDir(), "subject")
	if out, err := exec.Command("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, "testdata/subject.c").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	s := &subject{t: t, cmd: exec.Command(program, args...)}
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	s.cmd.Dir = "/"
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.pid = s.cmd.Process.Pid
	t.Cleanup(s.kill)
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("the program did not start: %q, %v", line, err)
	}
	if _, err := io.Copy(io.Discard, stdout); err != nil {
		t.Fatal(err)
	}
	return s
}

// kill ends all that is of the group, also after a restore, which has given the
// same numbers to others that are not our children.
func (s *subject) kill() {
	if s.pid == 0 {
		return
	}
	_ = unix.Kill(-s.pid, unix.SIGKILL)
	s.reap()
}

// reap waits for the end of the whole group: this process is the parent of what
// has lost its own.
func (s *subject) reap() {
	if s.cmd.ProcessState == nil {
		_ = s.cmd.Wait()
	}
	for {
		if _, err := unix.Wait4(-s.pid, nil, 0, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// pids are the processes of its group.
func (s *subject) pids() (out []int) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range stats {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if group, state := s.state(pid); group == s.pid && state != "Z" && state != "X" {
			out = append(out, pid)
		}
	}
	return out
}

func (s *subject) state(pid int) (group int, state string) {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(data), ") ")
	fields := strings.Fields(rest)
	if len(fields) < 3 {
		return 0, ""
	}
	group, _ = strconv.Atoi(fields[2])
	return group, fields[0]
}

// freeze stops the whole group at once.
func (s *subject) freeze() {
	s.t.Helper()
	if err := unix.Kill(-s.pid, unix.SIGSTOP); err != nil {
		s.t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		running := slices.DeleteFunc(s.pids(), func(pid int) bool { _, state := s.state(pid); return state == "T" })
		if len(running) == 0 {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%v do not stop", running)
		}
		time.Sleep(time.Millisecond)
	}
}

// content is what an object has, and where.
type content struct {
	name  string
	data  []byte
	where []pages.Range
}

// contents reads the objects of the group in an order that lasts over a restore:
// by their names and sizes.
func (s *subject) contents() []content {
	s.t.Helper()
	dev, err := internal()
	if err != nil {
		s.t.Fatal(err)
	}
	f := finding{dev: dev, objects: map[uint64]*object{}, sysv: map[uint64]uint64{}}
	if err := f.find(s.pids()); err != nil {
		s.t.Fatal(err)
	}
	var out []content
	for _, o := range f.objects {
		defer o.file.Close()
		fi, err := o.file.Stat()
		if err != nil {
			s.t.Fatal(err)
		}
		c := content{data: make([]byte, fi.Size())}
		link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", o.file.Fd()))
		if err != nil {
			s.t.Fatal(err)
		}
		c.name = fmt.Sprintf("%s of %d", strings.TrimPrefix(link, "/memfd:"), fi.Size())
		if _, err := o.file.ReadAt(c.data, 0); err != nil {
			s.t.Fatal(err)
		}
		if c.where, err = data(o.file); err != nil {
			s.t.Fatal(err)
		}
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b content) int { return strings.Compare(a.name, b.name) })
	return out
}

// differences counts the pages in which objects differ, and the objects that have data elsewhere.
func differences(t testing.TB, want, got []content) (n int) {
	t.Helper()
	if len(want) != len(got) {
		t.Fatalf("%d objects, want %d", len(got), len(want))
	}
	for i, w := range want {
		g := got[i]
		if w.name != g.name {
			t.Fatalf("object %s, want %s", g.name, w.name)
		}
		for at := 0; at < len(w.data); at += int(pageSize) {
			end := min(at+int(pageSize), len(w.data))
			if !bytes.Equal(w.data[at:end], g.data[at:end]) {
				n++
			}
		}
		if !slices.Equal(w.where, g.where) {
			t.Logf("%s has data in %d stretches, want %d", w.name, len(g.where), len(w.where))
			n++
		}
	}
	return n
}

func criu(t testing.TB, env []string, dir string, args ...string) time.Duration {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), criuLimit)
	defer cancel()
	log := args[0] + ".log"
	cmd := exec.CommandContext(ctx, "criu", append(args, "-v4", "--images-dir", dir, "--work-dir", filepath.Dir(dir), "--log-file", log)...)
	cmd.Env = append(os.Environ(), env...)
	begin := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		text, _ := os.ReadFile(filepath.Join(filepath.Dir(dir), log))
		lines := strings.Split(string(text), "\n")
		t.Fatalf("criu %s: %v\n%s\n%s", args[0], err, out, strings.Join(lines[max(0, len(lines)-40):], "\n"))
	}
	return time.Since(begin)
}

// capture is one checkpoint of a subject, in steps.
type capture struct {
	t       testing.TB
	subject *subject
	dir     string
	store   *pages.Store
	session *Session
	// trackers of the subject's processes.
	trackers []*track.Tracker
	want     []content
	stats    pages.Stats
	damage   func() // of what Scan has found
}

func begin(t testing.TB, s *subject, watched bool) *capture {
	t.Helper()
	c := &capture{t: t, subject: s, dir: filepath.Join(t.TempDir(), "images")}
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	var err error
	if c.store, err = pages.NewStore(filepath.Join(filepath.Dir(c.dir), "store")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.store.Discard() })
	var writers []Writer
	for _, pid := range s.pids() {
		w := Writer{Pid: pid, NsPid: pid}
		if watched {
			// As the first process of a container.
			w.NsPid = 1
			w.Tracker, err = track.Attach(context.Background(), pid)
			switch {
			case errors.Is(err, track.ErrUnsupported):
				missing(t, err.Error())
			case errors.Is(err, track.ErrGone):
				w.Tracker = nil
			case err != nil:
				t.Fatal(err)
			default:
				t.Cleanup(func() { _ = w.Tracker.Close() })
				c.trackers = append(c.trackers, w.Tracker)
			}
		}
		writers = append(writers, w)
	}
	if c.session, err = Start(context.Background(), writers, c.store); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.session.Close() })
	return c
}

func (c *capture) round() {
	c.t.Helper()
	c.session.next = time.Time{}
	begin := time.Now()
	n, err := c.session.Round(context.Background())
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Logf("round: %d KiB in %s", n>>10, time.Since(begin))
}

// take freezes the group, takes what changed, and lets CRIU end it.
func (c *capture) take(env ...string) {
	c.t.Helper()
	c.subject.freeze()
	c.want = c.subject.contents()
	if len(env) == 0 {
		env = []string{"COHORT_CRIU_SKIP_SHMEM=" + c.session.Skip()}
	}
	begin := time.Now()
	c.session.Scan(false)
	scanned := time.Since(begin)
	if c.damage != nil {
		c.damage()
	}
	if err := c.session.Take(context.Background()); err != nil {
		c.t.Fatal(err)
	}
	c.t.Logf("scanned in %s, taken in %s", scanned, time.Since(begin)-scanned)
	for _, t := range c.trackers {
		if err := t.Close(); err != nil {
			c.t.Fatal(err)
		}
	}
	criu(c.t, env, c.dir, "dump", "--tree", strconv.Itoa(c.subject.pid))
	c.subject.reap()
}

// compose completes the images and restores them.
func (c *capture) compose() []content {
	c.t.Helper()
	clean, err := c.session.Compose(context.Background(), c.dir)
	if err != nil {
		c.t.Fatal(err)
	}
	if c.stats, err = pages.Compose(context.Background(), c.dir, c.store, clean); err != nil {
		c.t.Fatal(err)
	}
	if err := errors.Join(c.session.Close(), c.store.Discard()); err != nil {
		c.t.Fatal(err)
	}
	c.t.Logf("%+v %+v", c.session.Stats(), c.stats)
	criu(c.t, nil, c.dir, "restore", "--restore-detached")
	return c.subject.contents()
}

// TestSharedMemoryIsRestoredAsItWasAtTheFreeze goes the whole way with every kind of writer at work.
func TestSharedMemoryIsRestoredAsItWasAtTheFreeze(t *testing.T) {
	needRoot(t, "gcc", "criu")
	for _, test := range []struct {
		name   string
		rounds int
		env    []string
		// watched: writers are tracked, as far as that goes.
		watched bool
	}{
		{"at once", 0, nil, false},
		{"after rounds", 5, nil, false},
		{"CRIU skips nothing", 2, []string{"COHORT_CRIU_SKIP_SHMEM="}, false},
		{"watched", 4, nil, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := begin(t, start(t), test.watched)
			for range test.rounds {
				time.Sleep(20 * time.Millisecond)
				c.round()
			}
			time.Sleep(20 * time.Millisecond)
			c.take(test.env...)
			got := c.compose()
			if n := differences(t, c.want, got); n > 0 {
				t.Errorf("%d pages are not as they were", n)
			}
			if len(c.want) != 6 {
				t.Errorf("the program has %d shared objects, want 6", len(c.want))
			}
			st := c.session.Stats()
			switch {
			case test.env != nil && (st.Precopied != 0 || st.Held != 0 || st.Criu < 16<<20):
				t.Errorf("CRIU was to dump everything: %+v", st)
			case test.env == nil && (c.stats.Overlap != 0 || st.Criu > least || st.Held == 0 || st.Precopied < 1<<20):
				t.Errorf("%+v, %+v; is the preload library of this version installed (contrib/setup/setup.sh)?", st, c.stats)
			}
		})
	}
}

// TestWithoutTheComparisonTheRestoredMemoryWouldBeWrong is the proof that the test above can fail.
func TestWithoutTheComparisonTheRestoredMemoryWouldBeWrong(t *testing.T) {
	needRoot(t, "gcc", "criu")
	c := begin(t, start(t), false)
	time.Sleep(50 * time.Millisecond)
	c.take()
	for _, o := range c.session.objects {
		// What came new since must be somewhere: that is taken nevertheless.
		o.held = slices.DeleteFunc(o.held, func(p piece) bool {
			missing, err := o.store.Missing([]pages.Range{{Start: p.off, End: p.end()}})
			return err == nil && len(missing) == 0
		})
	}
	if n := differences(t, c.want, c.compose()); n < 100 {
		t.Errorf("only %d pages differ: the program does not write as it should", n)
	}
}

// TestOnlyWhatTheWritersTouchedIsCompared is about anonymous memory all of whose writers are known.
func TestOnlyWhatTheWritersTouchedIsCompared(t *testing.T) {
	needRoot(t, "gcc", "criu")
	for _, test := range []struct {
		name   string
		mode   string
		damage func(*capture)
		right  bool
	}{
		{"as it is", "quiet", nil, true},
		{"holes are made", "punch", nil, true},
		{"what they touched is not believed", "quiet", func(c *capture) {
			for _, o := range c.session.objects {
				o.suspects = nil
			}
		}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := begin(t, start(t, "64", "3", test.mode), true)
			if c.session.watch == nil {
				t.Fatalf("nobody watches the writers: %v", c.session.unwatched)
			}
			for range 4 {
				time.Sleep(20 * time.Millisecond)
				c.round()
			}
			time.Sleep(50 * time.Millisecond)
			if test.damage != nil {
				c.damage = func() { test.damage(c) }
			}
			c.take()
			if c.session.unwatched != nil {
				t.Fatal(c.session.unwatched)
			}
			n := differences(t, c.want, c.compose())
			if test.right != (n == 0) {
				t.Errorf("%d pages are not as they were", n)
			}
			switch st := c.session.Stats(); {
			case test.mode == "punch" && st.Compared < 64<<20:
				t.Errorf("nobody has seen the holes: %+v", st)
			case test.mode == "quiet" && test.right && (st.Compared > 32<<20 || st.Held == 0):
				t.Errorf("of 64 MiB: %+v", st)
			}
		})
	}
}
