// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/harness"
	barrier "github.com/cohort-project/cohort/runtime/group"
	"github.com/cohort-project/cohort/runtime/journal"
)

// scheduleDocument is what docs/cli.md documents of cohort schedule --list --json.
type scheduleDocument struct {
	Namespace string    `json:"namespace"`
	Group     string    `json:"group"`
	Ref       string    `json:"ref"`
	Every     float64   `json:"every_seconds"`
	Keep      int       `json:"keep"`
	Address   string    `json:"address"`
	Created   time.Time `json:"created"`
	Running   bool      `json:"running"`
	Next      time.Time `json:"next"`
	Last      *struct {
		Epoch  string    `json:"epoch"`
		Number int       `json:"epoch_number"`
		Ref    string    `json:"ref"`
		At     time.Time `json:"at"`
		StopMS float64   `json:"stop_ms"`
	} `json:"last"`
	Passes   int       `json:"passes"`
	Failed   int       `json:"failed"`
	Failures int       `json:"failures"`
	Error    string    `json:"error"`
	ErrorAt  time.Time `json:"error_at"`
}

// scheduled is a group with a schedule.
type scheduled struct {
	*group
	ref string
}

// schedule sets a schedule, which is removed with its images when the test ends.
func (g *group) schedule(every time.Duration, keep int) *scheduled {
	g.Helper()
	s := &scheduled{g, "test.local/" + g.in.Name("sched") + ":ck"}
	g.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if out, err := g.in.Cohort(ctx, "schedule", "--list", "--json"); err == nil && strings.Contains(out, s.ref) {
			if _, err := g.in.Cohort(ctx, "schedule", "--remove", g.name); err != nil {
				g.Error(err)
			}
		}
		if err := g.in.RemoveImages(ctx, s.names(ctx)...); err != nil {
			g.Error(err)
		}
	})
	doc := decode[scheduleDocument](g.world, "schedule", "--every", every.String(), "--keep", fmt.Sprint(keep), g.name, s.ref)
	if doc.Group != g.name || doc.Ref != s.ref || doc.Every != every.Seconds() || doc.Keep != keep || doc.Address != g.in.Address || doc.Namespace != g.in.Namespace() {
		g.Errorf("set: %+v", doc)
	}
	return s
}

// trackers counts the userfaultfds of a member's shim, by which the writes of its
// processes are tracked.
func (g *group) trackers(id string) (n int) {
	g.Helper()
	rec, err := journal.ReadMember(g.in.State, g.in.Namespace(), id)
	if err != nil {
		g.Fatal(err)
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", rec.Shim.Pid))
	if err != nil || len(fds) == 0 {
		g.Fatalf("the descriptors of the shim of %s: %v, %v", id, fds, err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && strings.Contains(to, "userfaultfd") {
			n++
		}
	}
	return n
}

// names are the images of the schedule's groups.
func (s *scheduled) names(ctx context.Context) (names []string) {
	out, err := s.in.Ctr(ctx, "images", "ls", "-q")
	if err != nil {
		s.Fatal(err)
	}
	for _, name := range strings.Fields(out) {
		if name == s.ref || strings.HasPrefix(name, s.ref+".") && !strings.Contains(name[len(s.ref):], "-") {
			names = append(names, name)
		}
	}
	return names
}

// status is the schedule's line of the list.
func (s *scheduled) status() scheduleDocument {
	s.Helper()
	for _, d := range decode[[]scheduleDocument](s.world, "schedule", "--list") {
		if d.Group == s.name {
			return d
		}
	}
	s.Fatalf("group %s is not on the list", s.name)
	return scheduleDocument{}
}

// until waits for a state of the schedule and checks at each look that no more
// epochs are there than may be.
func (s *scheduled) until(what string, keep int, reached func(scheduleDocument) bool) scheduleDocument {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	for {
		d := s.status()
		// One more while a pass has made one and not yet removed another.
		if n := len(slices.DeleteFunc(s.names(ctx), func(n string) bool { return n == s.ref })); n > keep+1 || !d.Running && n > keep {
			if again := s.status(); again.Passes == d.Passes && !again.Running {
				s.Errorf("%d epochs are there, %d are to be kept", n, keep)
			}
		}
		if reached(d) {
			return d
		}
		select {
		case <-ctx.Done():
			s.Fatalf("never came: %s; the schedule is %+v", what, d)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func TestAScheduleGoesOnAfterTheDaemonIsKilledAndKeepsSoManyEpochs(t *testing.T) {
	w := setUp(t)
	w.longer(4 * time.Minute)
	g := w.tickers(2)
	before := g.reports()
	s := g.schedule(2*time.Second, 3)
	d := s.until("four epochs", 3, func(d scheduleDocument) bool { return d.Last != nil && d.Last.Number >= 4 })
	if d.Failures != 0 || d.Last.StopMS <= 0 || !strings.HasPrefix(d.Last.Ref, s.ref+".") {
		t.Errorf("%+v", d)
	}
	out := w.cohort("schedule", "--list", "--json")
	strict(t, out, &[]scheduleDocument{})
	documented(t, "schedule", out)
	if out := w.cohort("schedule", "--list"); !strings.Contains(out, "GROUP") || !strings.Contains(out, g.name) || !strings.Contains(out, s.ref) {
		t.Errorf("cohort schedule --list:\n%s", out)
	}
	fi, err := os.Stat(filepath.Join(w.in.Root, "schedules", w.in.Namespace(), g.name+".json"))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the schedule's file: %v, %v", fi, err)
	}

	w.in.KillDaemon(t, harness.Cohortd)
	w.in.Restart(t)
	d = s.until("two epochs more", 3, func(now scheduleDocument) bool { return now.Last.Number >= d.Last.Number+2 })
	g.reports()

	// By the name that does not change, the newest.
	newest := s.until("a pause", 3, func(d scheduleDocument) bool { return !d.Running })
	r := decode[struct {
		Target struct {
			Digest string `json:"digest"`
		} `json:"target"`
		Number int `json:"epoch_number"`
	}](w, "inspect", s.ref)
	if r.Number < newest.Last.Number {
		t.Errorf("%s is epoch %d, the newest is %d", s.ref, r.Number, newest.Last.Number)
	}

	for _, id := range g.ids {
		if g.trackers(id) == 0 {
			t.Errorf("the writes of %s are not tracked between two epochs", id)
		}
	}
	w.cohort("schedule", "--remove", g.name)
	for _, id := range g.ids {
		if n := g.trackers(id); n != 0 {
			t.Errorf("removed, and %d processes of %s are tracked", n, id)
		}
	}
	if out := w.cohort("schedule", "--list"); strings.Contains(out, g.name) {
		t.Errorf("removed, and on the list: %s", out)
	}
	left := s.names(w.ctx)
	if len(left) != 4 { // three epochs, and the newest by its other name
		t.Errorf("left: %v", left)
	}
	time.Sleep(3 * time.Second) // more than the interval
	if now := s.names(w.ctx); !slices.Equal(now, left) {
		t.Errorf("removed, and it goes on: %v, before %v", now, left)
	}
	g.restored(s.ref, "-copy", before)
	g.reports()
}

func TestAScheduleOutlivesItsGroupAndItsContainerd(t *testing.T) {
	w := setUp(t)
	w.longer(4 * time.Minute)
	g := w.tickers(1)
	s := g.schedule(time.Second, 1)
	s.until("an epoch", 1, func(d scheduleDocument) bool { return d.Last != nil })

	w.remove(g.ids...)
	d := s.until("an error", 1, func(d scheduleDocument) bool { return d.Failures >= 2 })
	if !strings.Contains(d.Error, g.name) {
		t.Errorf("the error does not name the group: %s", d.Error)
	}
	g.start(0)
	d = s.until("an epoch of the new one", 1, func(d scheduleDocument) bool { return d.Failures == 0 && !d.Running })

	w.in.KillDaemon(t, harness.Containerd)
	// cohort schedule needs cohortd only.
	failed := func() bool {
		doc := decode[[]scheduleDocument](w, "schedule", "--list")
		return len(doc) == 1 && doc[0].Failures > 0 && strings.Contains(doc[0].Error, "containerd")
	}
	deadline := time.Now().Add(30 * time.Second)
	for !failed() {
		if time.Now().After(deadline) {
			t.Fatalf("no error without containerd: %s", w.cohort("schedule", "--list", "--json"))
		}
		time.Sleep(100 * time.Millisecond)
	}
	w.in.Restart(t)
	s.until("an epoch with the new containerd", 1, func(now scheduleDocument) bool { return now.Failures == 0 && now.Last.Number > d.Last.Number })
}

// The daemon coordinates: a group that stands still for it must not wait for its return.
func TestADaemonThatEndsInAPassLeavesTheMembersRunning(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(w *world)
		// counted is set where the next daemon has to find out by itself.
		counted bool
	}{
		{"killed", func(w *world) { w.in.KillDaemon(w, harness.Cohortd) }, true},
		{"terminated", func(w *world) {
			if took := w.in.EndDaemon(w, harness.Cohortd); took > 5*time.Second {
				w.Errorf("it took %v to end", took)
			}
		}, false},
	} {
		for _, p := range []point{{barrier.Prepared, true}, {barrier.Frozen, false}, {barrier.Captured, true}, {barrier.Sealed, true}} {
			t.Run(fmt.Sprintf("%s when a member was %v", c.name, p), func(t *testing.T) {
				w := setUp(t)
				g := w.tickers(2)
				seen := w.watchDir(w.epochsDir())
				s := g.schedule(4*time.Second, 2)
				if _, err := seen.until(w.ctx, g.ids[0], p); err != nil {
					t.Fatal(err)
				}
				c.end(w)
				for _, id := range g.ids {
					ctx, cancel := context.WithTimeout(w.ctx, recovery)
					defer cancel()
					w.must(g.runs(ctx, id))
				}
				w.in.Restart(t)
				if d := s.status(); (d.Failures == 1) != c.counted && d.Last == nil {
					t.Errorf("after the restart: %+v", d)
				}
				s.until("an epoch after the restart", 2, func(d scheduleDocument) bool { return d.Last != nil && d.Failures == 0 && !d.Running })
				w.cohort("schedule", "--remove", g.name)
				harness.Eventually(t, recovery, w.in.Leaks)
				g.reports()
			})
		}
	}
}

func TestWrongUseOfAScheduleIsRefused(t *testing.T) {
	w := setUp(t)
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"schedule g ref", 2, "--every"},
		{"schedule --every 10ms g ref", 2, "--every"},
		{"schedule --every 1s --keep 0 g ref", 2, "--keep"},
		{"schedule --every 1s g UPPER", 2, "UPPER"},
		{"schedule --every 1s a/b ref", 2, "a/b"},
		{"schedule --every 1s g", 2, "GROUP and REF"},
		{"schedule --every 1s --list", 2, "--every"},
		{"schedule --list --remove g", 2, "not both"},
		{"schedule --remove", 2, "GROUP"},
		{"schedule --remove nobody", 1, "nobody"},
		{"schedule --list --daemon /nowhere/host.sock", 1, "--daemon"},
	} {
		err := w.failure(strings.Fields(c.args)...)
		if err.ExitCode() != c.code || !strings.Contains(err.Stderr, c.says) {
			t.Errorf("cohort %s: exit code %d, want %d: %s", c.args, err.ExitCode(), c.code, err.Stderr)
		}
	}
	if out := w.cohort("schedule", "--list", "--json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("an empty list: %s", out)
	}
}
