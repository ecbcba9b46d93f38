// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
	"github.com/cohort-project/cohort/runtime/ops"
)

// mark leaves a file in a container, as something written before the checkpoint.
func (w *world) mark(pid int, path, text string) {
	w.Helper()
	w.must(os.WriteFile(fmt.Sprintf("/proc/%d/root%s", pid, path), []byte(text), 0o600))
}

// hidden expects that a process sees nothing of its checkpoint.
func (w *world) hidden(pid int) {
	w.Helper()
	if _, err := os.Lstat(fmt.Sprintf("/proc/%d/root/.cohort", pid)); !os.IsNotExist(err) {
		w.Errorf("the checkpoint is visible in the container: %v", err)
	}
}

// ownCgroup expects that a process is in its own container's cgroups.
func (w *world) ownCgroup(id string, pid int) {
	w.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	w.must(err)
	for line := range strings.Lines(string(b)) {
		// Not every hierarchy need have the container.
		path := line[strings.LastIndexByte(strings.TrimSpace(line), ':')+1:]
		if path = strings.TrimSpace(path); path != "/" && filepath.Base(path) != id {
			w.Errorf("a process of container %s is in cgroup %s", id, strings.TrimSpace(line))
		}
	}
}

func TestEveryMemberResumesFromItsImageWithTheStockClientAsOftenAsWanted(t *testing.T) {
	w := setUp(t)
	g := w.tickers(2)
	for i, id := range g.ids {
		w.mark(g.pids[id], "/mark", g.members[i])
	}
	before := g.reports()
	ref := w.image("members")
	g.checkpoint(ref)
	for round := range 2 {
		for _, m := range g.members {
			id, pid := w.resume(harness.Container{Image: ref + "-" + m})
			w.goesOn(pid, before[m])
			if got := w.inside(pid, "mark"); got != m {
				t.Errorf("round %d: member %s finds %q in its file", round, m, got)
			}
			w.hidden(pid)
			w.ownCgroup(id, pid)
			w.remove(id)
		}
	}
	// And side by side.
	_, one := w.resume(harness.Container{Image: ref + "-a"})
	_, two := w.resume(harness.Container{Image: ref + "-a"})
	w.goesOn(one, before["a"])
	w.goesOn(two, before["a"])
	for m, r := range g.reports() { // the originals have noticed nothing
		if r.Writes <= before[m].Writes {
			t.Errorf("member %s stands still", m)
		}
	}
}

func TestGroupComesBackUnderItsOwnNameOrAnother(t *testing.T) {
	w := setUp(t)
	g := w.tickers(2)
	before := g.reports()
	ref := w.image("group")
	g.checkpoint(ref)
	copies := g.restored(ref, "-copy", before)
	groups := map[string][]string{}
	for _, s := range decode[[]ops.Status](w, "ps") {
		groups[s.Group] = append(groups[s.Group], s.ID)
		if s.State != "running" {
			t.Errorf("container %s is %s", s.ID, s.State)
		}
	}
	if !slices.Equal(groups[g.name], g.ids) || !slices.Equal(groups[g.name+"-copy"], copies) {
		t.Errorf("groups are %v", groups)
	}
	for _, id := range copies {
		w.ownCgroup(id, w.pid(id))
	}
	w.remove(g.ids...)
	g.restored(ref, "", before)
	for _, id := range copies {
		w.ask(w.pid(id)) // still there
	}
}

func TestRestoredContainersAreCheckpointedAndRestoredAgain(t *testing.T) {
	w := setUp(t)
	g := w.tickers(2)
	for generation := range 3 {
		w.mark(g.pids[g.ids[0]], fmt.Sprintf("/generation%d", generation), "x")
		before := g.reports()
		ref := w.image("chain")
		if r := g.checkpoint(ref); r.Number != 1 { // each generation is a group of another name
			t.Errorf("the first epoch of group %s has number %d", g.name, r.Number)
		}
		w.remove(g.ids...)
		suffix := fmt.Sprintf("-%d", generation)
		g.ids = g.restored(ref, suffix, before)
		g.name += suffix
		for _, id := range g.ids {
			g.pids[id] = w.pid(id)
		}
		for old := range generation + 1 {
			w.inside(g.pids[g.ids[0]], fmt.Sprintf("generation%d", old))
		}
		w.hidden(g.pids[g.ids[0]])
	}
}

func TestCheckpointImagesAreOrdinaryImagesForStockContainers(t *testing.T) {
	w := setUp(t)
	id, pid := w.run(harness.Container{Args: ticker, Annotations: []string{"io.cohort.member=a"}})
	w.mark(pid, "/mark", "captured")
	before := w.ask(pid)
	ref := w.image("stock")
	w.cohort("checkpoint", "--member", id, ref)
	for _, c := range []struct {
		name        string
		runtime     harness.Runtime
		annotations []string
	}{
		{"stock runtime and snapshotter", harness.Stock, nil},
		{"stock runtime", harness.Runtime{Name: "stock-cohort", Runtime: harness.Stock.Runtime, Snapshotter: harness.CohortOnCohort.Snapshotter}, nil},
		{"stock snapshotter", harness.CohortOnStock, nil},
		{"by annotation", harness.CohortOnCohort, []string{"io.cohort.restore=false"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := &world{T: t, in: w.in, ctx: w.ctx}
			_, pid := w.in.Run(t, c.runtime, harness.Container{Image: ref + "-a", Annotations: c.annotations, Args: ticker})
			// Its own first report, with the number 0, replaces the captured one.
			harness.Eventually(t, recovery, func() error {
				var r programs.Ticker
				if err := decodeJSON(w.inside(pid, reportPath), &r); err != nil {
					return err
				}
				if r.N > 0 {
					return fmt.Errorf("its report is %+v", r)
				}
				return nil
			})
			if r := w.ask(pid); r.N != 1 {
				t.Errorf("it is at %+v, the checkpoint was taken after %+v", r, before)
			}
			if got := w.inside(pid, "mark"); got != "captured" {
				t.Errorf("the captured file holds %q", got)
			}
			if c.runtime.Snapshotter == harness.CohortOnCohort.Snapshotter {
				w.hidden(pid)
				return
			}
			// Another snapshotter does not know the reserved directory; it is root's alone.
			fi, err := os.Lstat(fmt.Sprintf("/proc/%d/root/.cohort", pid))
			w.must(err)
			if fi.Mode().Perm() != 0o700 {
				t.Errorf("the checkpoint may be read by others: %v", fi.Mode())
			}
		})
	}
}

func TestReadOnlyRootsAndTemporaryFilesComeBack(t *testing.T) {
	w := setUp(t)
	args := []string{"/bin/ticker", "--mem", "4", "--checksum", "--file", "/run/counter", "--report", "/run/report"}
	id, pid := w.in.Run(t, harness.CohortOnCohort, harness.Container{
		Image: harness.ToolsImage, Args: args, More: []string{"--read-only"}, Annotations: []string{"io.cohort.member=a"},
	})
	w.must(programs.WaitReady(w.ctx, pid, "/run/report"))
	ref := w.image("readonly")
	w.cohort("checkpoint", "--member", id, ref)
	w.remove(id)

	report := func(pid int) (r programs.Ticker) {
		t.Helper()
		w.must(programs.AskVerified(w.ctx, pid, "/run/report", &r))
		return r
	}
	_, pid = w.resume(harness.Container{Image: ref + "-a", More: []string{"--read-only"}})
	if r := report(pid); !r.SumOK || r.Counter == 0 {
		t.Errorf("it is at %+v", r)
	}
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/root/file", pid), nil, 0o600); err == nil {
		t.Error("the root file system can be written to")
	}
	w.in.RemoveAfter(t, id+"-r")
	r := decode[shop.Restored](w, "restore", "--id-suffix", "-r", ref)
	if r := report(r.Members[0].Pid); !r.SumOK || r.Counter == 0 {
		t.Errorf("it is at %+v", r)
	}
	// A client that would have it writable is told what is wrong.
	writable := w.in.Name("rw")
	w.in.RemoveAfter(t, writable)
	err := w.in.CtrOf(harness.CohortOnCohort).Run(w.ctx, harness.Container{ID: writable, Image: ref + "-a"})
	if err == nil || !strings.Contains(err.Error(), "--read-only") {
		t.Errorf("a writable root: %v", err)
	}
}

func TestSmallBindMountedFilesAreInTheImageAndDirectoriesAreAskedFor(t *testing.T) {
	w := setUp(t)
	dir := t.TempDir()
	hosts := filepath.Join(dir, "hosts")
	w.must(os.WriteFile(hosts, []byte("10.1.2.3 shop\n"), 0o644))
	data := filepath.Join(dir, "data")
	w.must(os.Mkdir(data, 0o755))
	w.must(os.WriteFile(filepath.Join(data, "file"), []byte("volume"), 0o644))
	bind := "type=bind,src=" + data + ",dst=/data,options=rbind:rw"
	id, pid := w.run(harness.Container{Args: ticker, Annotations: []string{"io.cohort.member=a"}, More: []string{
		"--mount", "type=bind,src=" + hosts + ",dst=/etc/hosts,options=rbind:ro", "--mount", bind,
	}})
	before := w.ask(pid)
	ref := w.image("binds")
	w.cohort("checkpoint", "--member", id, ref)
	w.remove(id)
	w.must(os.Remove(hosts))

	err := w.failure("restore", ref)
	if err.ExitCode() != 1 || !strings.Contains(err.Stderr, "--bind /data=PATH") || strings.Contains(err.Stderr, "hosts") {
		t.Errorf("without the directory it exits with %d and says %q", err.ExitCode(), err.Stderr)
	}
	if list, _ := w.in.CtrOf(harness.CohortOnCohort).Containers(w.ctx); slices.Contains(list, id) {
		t.Errorf("container %s was left by the restore that failed", id)
	}
	refused := w.in.Name("refused")
	w.in.RemoveAfter(t, refused)
	if err := w.in.CtrOf(harness.CohortOnCohort).Run(w.ctx, harness.Container{ID: refused, Image: ref + "-a"}); err == nil || !strings.Contains(err.Error(), "dst=/data") {
		t.Errorf("the stock client without the directory: %v", err)
	}

	check := func(pid int) {
		t.Helper()
		w.goesOn(pid, before)
		if got := w.inside(pid, "etc/hosts"); got != "10.1.2.3 shop\n" {
			t.Errorf("/etc/hosts holds %q", got)
		}
		if got := w.inside(pid, "data/file"); got != "volume" {
			t.Errorf("/data/file holds %q", got)
		}
	}
	_, pid = w.resume(harness.Container{Image: ref + "-a", More: []string{"--mount", bind}})
	check(pid)
	w.in.RemoveAfter(t, id)
	r := decode[shop.Restored](w, "restore", "--bind", "/data="+data, ref)
	check(r.Members[0].Pid)
}

func TestUnprivilegedContainersWithSeccompComeBackAsThey(t *testing.T) {
	w := setUp(t)
	args := []string{"/bin/ticker", "--mem", "4", "--checksum", "--file", "/tmp/counter", "--report", "/tmp/report"}
	id, pid := w.in.Run(t, harness.CohortOnCohort, harness.Container{
		Image: harness.ToolsImage, Args: args, More: []string{"--user", "1000:1000", "--seccomp"}, Annotations: []string{"io.cohort.member=a"},
	})
	w.must(programs.WaitReady(w.ctx, pid, "/tmp/report"))
	was := w.privileges(pid)
	if was["NoNewPrivs"] != "1" || was["Seccomp"] != "2" || !strings.HasPrefix(was["Uid"], "1000") {
		t.Fatalf("the original runs with %v", was)
	}
	ref := w.image("user")
	w.cohort("checkpoint", "--member", id, ref)
	w.remove(id)
	w.in.RemoveAfter(t, id)
	pids := []int{decode[shop.Restored](w, "restore", ref).Members[0].Pid}
	_, pid = w.resume(harness.Container{Image: ref + "-a", More: []string{"--seccomp"}})
	for _, pid := range append(pids, pid) {
		var r programs.Ticker
		w.must(programs.AskVerified(w.ctx, pid, "/tmp/report", &r))
		if !r.SumOK {
			t.Errorf("it is at %+v", r)
		}
		is := w.privileges(pid)
		for name, value := range was {
			if is[name] != value {
				t.Errorf("%s was %q and is %q", name, value, is[name])
			}
		}
	}
}

// status is a process's status file (proc(5)).
func (w *world) status(pid int) string {
	w.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	w.must(err)
	return string(b)
}

// privileges are what a process may do.
func (w *world) privileges(pid int) map[string]string {
	w.Helper()
	out := map[string]string{}
	for line := range strings.Lines(w.status(pid)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		switch name {
		case "Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb":
			out[name] = strings.TrimSpace(value)
		}
	}
	return out
}

func TestPrivateNetworkNamespaceComesBackWithItsLoopbackUp(t *testing.T) {
	w := setUp(t)
	id, pid := w.run(harness.Container{Args: ticker, Annotations: []string{"io.cohort.member=a"}})
	w.must(shop.InNetNS(netns(pid), func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	}))
	ref := w.image("lo")
	w.cohort("checkpoint", "--member", id, ref)
	w.remove(id)
	w.in.RemoveAfter(t, id)
	r := decode[shop.Restored](w, "restore", ref)
	copied, pid := w.resume(harness.Container{Image: ref + "-a"})
	for _, pid := range []int{r.Members[0].Pid, pid} {
		w.must(shop.InNetNS(netns(pid), func() error {
			lo, err := net.InterfaceByName("lo")
			if err == nil && lo.Flags&net.FlagUp == 0 {
				err = fmt.Errorf("lo is down: %v", lo.Flags)
			}
			return err
		}))
	}
	w.remove(id, copied)
	// What was made for them goes with them.
	left, err := os.ReadDir(filepath.Join(w.in.State, "netns"))
	w.must(err)
	for _, e := range left {
		if strings.Contains(e.Name(), id) || strings.Contains(e.Name(), copied) || strings.Contains(e.Name(), r.Group) {
			t.Errorf("network namespace %s is left", e.Name())
		}
	}
}

func netns(pid int) string { return fmt.Sprintf("/proc/%d/ns/net", pid) }

func TestHostNetworkIsForContainersWithoutSockets(t *testing.T) {
	w := setUp(t)
	id, pid := w.run(harness.Container{Args: ticker, Annotations: []string{"io.cohort.member=a"}, More: []string{"--net-host"}})
	before := w.ask(pid)
	ref := w.image("host")
	w.cohort("checkpoint", "--member", id, ref)
	w.remove(id)
	w.in.RemoveAfter(t, id)
	w.goesOn(decode[shop.Restored](w, "restore", ref).Members[0].Pid, before)
	_, pid = w.resume(harness.Container{Image: ref + "-a", More: []string{"--net-host"}})
	w.goesOn(pid, before)

	l, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free now
	w.must(err)
	addr := l.Addr().String()
	w.must(l.Close())
	server, _ := w.run(harness.Container{Args: []string{"/bin/echo", "serve", "--listen", addr, "--report", reportPath}, More: []string{"--net-host"}})
	w.refused(server, "host's network", "checkpoint", "--member", server, w.image("sockets"))
}
