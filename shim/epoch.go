// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	storageAPI "github.com/cohort-project/cohort/api/storage/v1"
	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/runtime/criu"
	"github.com/cohort-project/cohort/runtime/freezer"
	"github.com/cohort-project/cohort/runtime/group"
	"github.com/cohort-project/cohort/runtime/journal"
	"github.com/cohort-project/cohort/runtime/netlock"
	"github.com/cohort-project/cohort/runtime/tmpfs"
	"github.com/cohort-project/cohort/runtime/urgent"
)

const (
	// defaultLease is used where the coordinator names none.
	defaultLease = 5 * time.Second
	// undoTimeout bounds what an abort may take.
	undoTimeout = 20 * time.Second
	// dumpGrace is how long a dump that has lost its coordinator may go on before
	// CRIU is killed, which may harm the tasks it has its code in.
	dumpGrace = 15 * time.Second
)

// acts are what one epoch does to one container, and how it is undone. They
// know nothing of phases and order: that is the ledger's (runtime/group).
type acts struct {
	c   *container
	req *memberAPI.PrepareRequest
	rec journal.Epoch // what of it the record on disk holds too

	runc    *criu.Container
	spec    *specs.Spec
	network *netlock.Namespace
	netnsID uint64
	tmpfs   []tmpfs.FS // carried beside CRIU
	inside  []tmpfs.FS // in images of CRIU's, which are filled afterwards
	memory  *memory
	// contents are those of the tmpfs mounts, saved when the container runs again;
	// copies are what of them was copied before, in the order of tmpfs.
	contents []*tmpfs.Contents
	copies   []*tmpfs.Copy
	// taken is closed when the copies are up to date with the frozen container.
	taken chan struct{}

	storageMu   sync.Mutex // renewals come while other calls go on
	storageConn *ttrpc.Client
	storage     storageAPI.StorageService
	dir         string // the capture's directory

	fz    *freezer.Freezer
	rules *netlock.Rules
	dump  *criu.Dump

	processes []*memberAPI.Process
	frozenAt  time.Time
	hurry     *urgent.Hurry // from the end of prepare until the container runs again
	gated     bool
	killed    bool
	parts     map[string]int64
	partsMu   sync.Mutex
}

// checkpointDir holds the checkpoint of the capture: metadata, and the images
// below oci.ImagesDir.
func (a *acts) checkpointDir() string { return filepath.Join(a.dir, "checkpoint") }

// persist puts what an undo needs to know into the record on disk.
func (a *acts) persist() error {
	return a.c.note(func(r *journal.Epoch) {
		r.Init, r.Freezer, r.Netns, r.Table = a.rec.Init, a.rec.Freezer, a.rec.Netns, a.rec.Table
		r.Criu, r.Storage, r.Capture = a.rec.Criu, a.rec.Storage, a.rec.Capture
	})
}

func (a *acts) timed(part string, f func() error) error {
	start := time.Now()
	err := f()
	a.partsMu.Lock()
	a.parts[part] += int64(time.Since(start))
	a.partsMu.Unlock()
	return err
}

// prepare makes all that can be made while the container runs.
func (a *acts) prepare(ctx context.Context, pid int) error {
	c := a.c
	if c.storage.socket == "" {
		return fmt.Errorf("the rootfs of container %s is not on the cohort snapshotter: create it with --snapshotter cohort: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	choice, err := chooseEngine(a.req.Engine)
	if err != nil {
		return fmt.Errorf("container %s: %w", c.id, err)
	}
	if a.rec.Init, err = journal.ProcOf(pid); err != nil {
		return fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	a.spec = &specs.Spec{}
	if err := readJSON(filepath.Join(c.bundle, "config.json"), a.spec); err != nil {
		return err
	}
	if a.runc, err = criu.LoadContainer(c.runcRoot, c.id); err != nil {
		return err
	}
	if a.fz, err = freezer.Open(pid); err != nil {
		return err
	}
	a.rec.Freezer = a.fz.Path()
	netns := fmt.Sprintf("/proc/%d/ns/net", pid)
	var hostNet bool
	a.netnsID, hostNet = netnsOf(pid)
	if !hostNet {
		a.rec.Netns, a.rec.Table = a.netnsPath(netns), a.req.Epoch[:12]+"-"+c.id
	}
	a.rec.Storage, a.rec.Capture = c.storage.socket, captureID(a.req.Epoch, c.ns, c.id)
	// Everything that follows leaves something behind if the shim dies.
	if err := a.persist(); err != nil {
		return err
	}
	if err := a.openStorage(ctx); err != nil {
		return err
	}
	if !hostNet {
		if a.rules, err = netlock.Prepare(netns, a.rec.Table); err != nil {
			return err
		}
		if a.network, err = a.captureNetwork(netns); err != nil {
			return err
		}
	}
	images := filepath.Join(a.checkpointDir(), oci.ImagesDir)
	for _, d := range []string{images, filepath.Join(a.checkpointDir(), oci.TmpfsDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	if a.tmpfs, err = tmpfs.List(pid); err != nil {
		return err
	}
	var external []string
	for _, f := range a.tmpfs {
		external = append(external, f.Destination)
	}
	if a.inside, err = tmpfs.Images(pid, a.tmpfs); err != nil {
		log.G(ctx).WithError(err).WithField("id", c.id).Info("CRIU archives tmpfs mounts itself, which makes the stop longer")
	}
	if a.memory, err = a.takeMemory(ctx, choice, pid, external, images); err != nil {
		return err
	}
	if err := a.copyTmpfs(ctx, pid, choice); err != nil {
		return err
	}
	// The copies lie where the storage snapshot is taken, which first writes back all that
	// is dirty there: seconds, on a busy disk. So they are written back before the freeze.
	flushed := make(chan error, 1)
	go func() { flushed <- flush(a.dir) }()
	if a.dump, err = criu.Start(ctx, criu.Config{
		Container: a.runc, ImagesDir: images, WorkDir: a.checkpointDir(), FreezeCgroup: a.fz.Path(), External: external,
		SkipClean: a.memory.session != nil, SkipShared: a.memory.skipShared(), PreDumped: a.memory.soft != nil,
		SkipTmpfs: len(a.inside) > 0, InMemory: a.memory.isSmall(), YieldCPU: a.req.YieldCpu,
	}); err != nil {
		return err
	}
	if a.rec.Criu, err = journal.ProcOf(a.dump.Pid()); err != nil {
		return fmt.Errorf("CRIU ended before the dump: %w", err)
	}
	if err := a.persist(); err != nil {
		return err
	}
	if pids, err := a.fz.Tasks(); err == nil {
		criu.Warm(pids)
	}
	select {
	case err = <-flushed:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("write back the memory copied so far: %w", err)
	}
	if err := a.memory.catchUp(ctx); err != nil {
		return fmt.Errorf("copy what container %s wrote meanwhile: %w", c.id, err)
	}
	// From here on nothing is started in the container or done to its cgroup
	// until it runs again.
	if err := c.gate.Acquire(ctx, gateWidth); err != nil {
		return fmt.Errorf("wait for calls going on in container %s: %w", c.id, err)
	}
	a.gated = true
	a.hurry = urgent.Approach()
	a.memory.keepWarm()
	return nil
}

// undoPrepare takes back a prepare that failed half-way.
func (a *acts) undoPrepare(ctx context.Context) error {
	err := errors.Join(a.cancelDump(ctx), a.tidy(), a.discard(ctx))
	a.openGate()
	a.closeStorage()
	return err
}

// openGate lets other calls to the container go on.
func (a *acts) openGate() {
	if a.gated {
		a.gated = false
		a.c.gate.Release(gateWidth)
	}
}

// netnsPath prefers the path by which the container joined its network
// namespace: it outlives the container's processes.
func (a *acts) netnsPath(proc string) string {
	for _, ns := range a.spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace && ns.Path != "" {
			return ns.Path
		}
	}
	return proc
}

// dialStorage connects to cohortd, again if need be.
func (a *acts) dialStorage() error {
	conn, err := shim.AnonDialer("unix://"+a.c.storage.socket, 5*time.Second)
	if err != nil {
		return fmt.Errorf("connect to cohortd at %s: %w; is it running?", a.c.storage.socket, err)
	}
	client := ttrpc.NewClient(conn)
	a.storageMu.Lock()
	defer a.storageMu.Unlock()
	if a.storageConn != nil {
		a.storageConn.Close()
	}
	a.storageConn, a.storage = client, storageAPI.NewStorageClient(client)
	return nil
}

// storageError says what a broken connection means.
func storageError(err error) error {
	if errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("cohortd has ended: %w", err)
	}
	return err
}

func (a *acts) openStorage(ctx context.Context) error {
	if err := a.dialStorage(); err != nil {
		return err
	}
	resp, err := uncut(ctx, a.storage.Open, &storageAPI.OpenRequest{
		Id: a.rec.Capture, Upperdir: a.c.storage.upper, LeaseMs: uint32(2 * a.lease().Milliseconds()),
		Labels: map[string]string{
			"namespace": a.c.ns, "container": a.c.id, "group": a.req.Group, "epoch": a.req.Epoch, "member": a.req.Member,
			"number": strconv.FormatUint(a.req.Number, 10), "stop": strconv.FormatBool(a.req.Stop),
		},
	})
	if err != nil {
		return fmt.Errorf("open the storage capture of container %s: %w", a.c.id, err)
	}
	a.dir = resp.Dir
	return nil
}

// uncutGrace is how long uncut waits for a call whose context has ended.
const uncutGrace = 5 * time.Second

// uncut makes a call that is not broken off when ctx ends: one that undoes it could
// overtake it then, find nothing to undo, and leave what comes after it.
func uncut[Q, R any](ctx context.Context, call func(context.Context, Q) (R, error), request Q) (R, error) {
	type answer struct {
		r   R
		err error
	}
	done := make(chan answer, 1)
	go func() {
		r, err := call(context.WithoutCancel(ctx), request)
		done <- answer{r, err}
	}()
	var a answer
	select {
	case a = <-done:
		return a.r, a.err
	case <-ctx.Done():
	}
	select {
	case a = <-done:
	case <-time.After(uncutGrace):
	}
	return a.r, errors.Join(ctx.Err(), a.err)
}

func (a *acts) lease() time.Duration {
	if a.req.LeaseMs > 0 {
		return time.Duration(a.req.LeaseMs) * time.Millisecond
	}
	return defaultLease
}

// freeze freezes the container's own cgroup at the given time, CLOCK_MONOTONIC in
// nanoseconds.
func (a *acts) freeze(ctx context.Context, at int64) (asked, frozen int64, err error) {
	left := time.Duration(at - group.Monotonic())
	if left <= 0 || left > longestSprint {
		left = sprintTime
	}
	until := time.Now().Add(left)
	ready := a.readyStorage(ctx, left)
	a.memory.sprint(ctx, time.Until(until)-urgent.Poised)
	ready()
	a.hurry.Raise()
	time.Sleep(time.Until(until))
	asked, frozen, err = a.fz.Freeze(ctx)
	a.frozenAt = time.Now()
	return asked, frozen, err
}

func (a *acts) lock() error {
	if a.rules == nil {
		return nil
	}
	return a.rules.Close()
}

func (a *acts) unlock() error {
	if a.rules == nil {
		return nil
	}
	if a.killed {
		if err := a.cutOff(); err != nil {
			log.L.WithError(err).WithField("id", a.c.id).Warn("the network namespace may answer for connections of a container that is dead")
		}
	}
	return a.rules.Open()
}

// capture dumps the frozen container, and takes its storage and tmpfs mounts at the
// same time. That is one instant as well: all who write there are frozen from before the
// first of it until after the last, and CRIU makes none of them write. CRIU itself makes
// names in the container's file system only for open files that have lost theirs, and
// storage is then taken anew when they are there.
func (a *acts) capture(ctx context.Context) error {
	var eg, beside, rest errgroup.Group
	early := errors.New("storage was not taken yet")
	a.taken = make(chan struct{})
	beside.Go(func() error {
		early = a.takeStorage(ctx) // tried again if it fails: a tree copied now may hold CRIU's names
		return nil
	})
	beside.Go(func() error { return a.timed("tmpfs", a.archiveTmpfs) })
	eg.Go(func() error {
		defer close(a.taken)
		return a.timed("shared", func() error { return a.takeTmpfs(ctx) })
	})
	eg.Go(func() error {
		return a.timed("criu", func() error {
			return a.dump.Finish(ctx, dumpGrace, criu.Hooks{
				Before: func() (held []int, err error) {
					err = a.timed("scan", func() error {
						held, err = a.memory.scan(ctx)
						return err
					})
					return held, err
				},
				// Not sooner: while CRIU seizes the tasks every processor is busy with that or with a scan.
				Beside: func() {
					rest.Go(func() error { return a.timed("pages", func() error { return a.memory.complete(ctx) }) })
				},
				PostDump: func() error {
					if err := errors.Join(beside.Wait(), rest.Wait()); err != nil {
						return err
					}
					if err := a.timed("rearm", func() error { return a.memory.rearm(ctx) }); err != nil {
						return err
					}
					linked, err := a.dump.LinksFiles()
					if err != nil || (early == nil && !linked) {
						return err
					}
					return a.takeStorage(ctx)
				},
			})
		})
	})
	err := errors.Join(eg.Wait(), beside.Wait())
	_ = rest.Wait() // its error has failed the dump
	return err
}

// readyStorage has the capture follow the container's files until the function that it
// returns is called.
func (a *acts) readyStorage(ctx context.Context, limit time.Duration) func() {
	ctx, cancel := context.WithTimeout(ctx, limit)
	go func() {
		_, err := a.storage.Ready(ctx, &storageAPI.CaptureRequest{Id: a.rec.Capture})
		if err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).WithField("id", a.c.id).Info("storage is taken in more time than it needs")
		}
	}()
	return cancel
}

func (a *acts) takeStorage(ctx context.Context) error {
	return a.timed("storage", func() error {
		_, err := a.storage.Take(ctx, &storageAPI.CaptureRequest{Id: a.rec.Capture})
		return storageError(err)
	})
}

// calm ends what freeze began; it may be called again.
func (a *acts) calm() { a.hurry.End() }

// resume thaws the container.
func (a *acts) resume(ctx context.Context) (int64, error) {
	if err := a.fz.Thaw(ctx); err != nil {
		return 0, err
	}
	a.calm()
	return group.Monotonic(), nil
}

// stop ends the frozen container: it is killed in its cgroup before anything
// in it could run again. Its connections end with it, unheard while the rules
// are up: in a network namespace that stays, the kernel would go on to part
// from their peers, who are to find them again where the container is restored.
func (a *acts) stop(ctx context.Context) (int64, error) {
	orphans, err := a.connections()
	if err != nil {
		log.G(ctx).WithError(err).WithField("id", a.c.id).Warn("the container's connections will be seen to end")
	}
	err = a.fz.Kill(ctx)
	a.killed = err == nil
	a.calm()
	at := group.Monotonic()
	if orphans != nil {
		if err := orphans(); err != nil {
			log.G(ctx).WithError(err).WithField("id", a.c.id).Warn("the container's connections may be seen to end")
		}
	}
	if err != nil {
		return 0, err
	}
	return at, nil
}

// tidy releases what only the barrier needed.
func (a *acts) tidy() error {
	a.calm()
	var errs []error
	if a.memory != nil {
		errs = append(errs, a.memory.close())
	}
	errs = append(errs, a.closeCopies())
	if a.rules != nil {
		errs = append(errs, a.rules.Remove())
		a.rules = nil
	}
	if a.fz != nil {
		errs = append(errs, a.fz.Close())
		a.fz = nil
	}
	return errors.Join(errs...)
}

// seal writes the metadata and makes the capture durable.
func (a *acts) seal(ctx context.Context) (*memberAPI.SealResponse, error) {
	images := filepath.Join(a.checkpointDir(), oci.ImagesDir)
	if err := a.dump.Save(ctx); err != nil {
		return nil, err
	}
	for _, c := range a.contents {
		if err := c.Save(ctx); err != nil {
			return nil, err
		}
	}
	if err := tmpfs.CheckImages(images); err != nil {
		return nil, err
	}
	done, err := a.memory.compose(ctx, images)
	if err != nil {
		return nil, err
	}
	// A later epoch that builds on this one asks for it; one that does not ends it.
	a.c.keep(a.req.Epoch, done.tracking)
	a.accountTmpfs(done.memory)
	if err := a.closeCopies(); err != nil {
		return nil, err
	}
	meta, err := a.metadata(done)
	if err != nil {
		return nil, err
	}
	if err := oci.WriteCheckpointDir(a.checkpointDir(), *meta, a.spec); err != nil {
		return nil, err
	}
	seal := &storageAPI.SealRequest{Id: a.rec.Capture}
	if done.memory.Increment != "" {
		seal.Uppers = a.memory.parent.uppers
	}
	resp, err := a.storage.Seal(ctx, seal)
	if err != nil {
		return nil, fmt.Errorf("seal the capture of container %s: %w", a.c.id, storageError(err))
	}
	// The size is known only now; the document is replaced in one step.
	meta.StorageBytes = resp.StorageBytes
	if err := oci.WriteCheckpointDir(a.checkpointDir(), *meta, a.spec); err != nil {
		return nil, err
	}
	return &memberAPI.SealResponse{
		StorageBytes: resp.StorageBytes, MemoryBytes: done.bytes, Memory: done.memory, FsDir: resp.FsDir, CheckpointDir: resp.CheckpointDir,
		Capture: a.rec.Capture,
	}, nil
}

// cancelDump ends a CRIU that has not begun.
func (a *acts) cancelDump(ctx context.Context) error {
	if a.dump == nil {
		return nil
	}
	// Owed until CRIU is gone: it would put the freezer back as it found it.
	if err := a.dump.Cancel(ctx); err != nil {
		return err
	}
	a.dump = nil
	return nil
}

// discard drops the capture.
func (a *acts) discard(ctx context.Context) error {
	if err := a.cancelDump(ctx); err != nil { // of one that was not saved
		return err
	}
	if a.storage == nil {
		return nil // never opened
	}
	_, err := a.storage.Discard(ctx, &storageAPI.CaptureRequest{Id: a.rec.Capture})
	if errors.Is(err, ttrpc.ErrClosed) {
		// cohortd has ended. Another one may be there, which knows nothing of what
		// was not sealed, and keeps what was.
		if err := a.dialStorage(); err != nil {
			return err
		}
		_, err = a.storage.Discard(ctx, &storageAPI.CaptureRequest{Id: a.rec.Capture})
	}
	return err
}

func (a *acts) renewStorage(ctx context.Context) error {
	a.storageMu.Lock()
	storage := a.storage
	a.storageMu.Unlock()
	if storage == nil {
		return nil
	}
	_, err := storage.Renew(ctx, &storageAPI.CaptureRequest{Id: a.rec.Capture, LeaseMs: uint32(2 * a.lease().Milliseconds())})
	return err
}

func (a *acts) closeStorage() {
	a.storageMu.Lock()
	defer a.storageMu.Unlock()
	if a.storageConn != nil {
		a.storageConn.Close()
		a.storageConn, a.storage = nil, nil
	}
}

// flush writes back the file system of dir.
func flush(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

func mustJSON(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		return nil
	}
	return b
}
