// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	cgroupsv2 "github.com/containerd/cgroups/v3/cgroup2"
	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/process"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oom"
	oomv1 "github.com/containerd/containerd/v2/pkg/oom/v1"
	ptypes "github.com/containerd/containerd/v2/pkg/protobuf/types"
	containerdshim "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	runc "github.com/containerd/go-runc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/api/annotation"
	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/runtime/criu"
	"github.com/cohort-project/cohort/runtime/group"
	"github.com/cohort-project/cohort/runtime/journal"
)

// service is the stock Task service, with restore on create, and the Member
// service beside it on the same socket.
type service struct {
	taskAPI.TTRPCTaskService

	publisher containerdshim.Publisher
	// containerd is the gRPC address of the containerd that started the shim.
	containerd string
	address    string

	mu         sync.Mutex
	containers map[string]*container
	oom1       oom.Watcher
}

// container is what the shim keeps of one container beside the stock service.
type container struct {
	id, ns, bundle string
	// runcRoot is the directory of runc's state for the namespace.
	runcRoot string
	storage  storageRef
	group    string
	name     string

	// gate is held by calls that start or reconfigure processes, one unit each,
	// and whole by an epoch from the end of Prepare until the container runs again.
	gate *semaphore.Weighted

	// restore is set for a container that is created from a checkpoint.
	restore *restore

	// cgroup of a restored container; the stock service only knows that of
	// containers it created afresh.
	cgMu   sync.Mutex
	cgroup any

	epochMu sync.Mutex
	part    *group.Participant
	epoch   *acts // the open epoch's, or the last one's

	recMu sync.Mutex
	rec   *journal.Epoch // on disk; nil while no epoch is open

	keptMu sync.Mutex
	kept   *kept // tracking between two epochs
}

// gateWidth is more calls than will ever be going on at once.
const gateWidth = 1 << 30

func newService(ctx context.Context, publisher containerdshim.Publisher, sd shutdown.Service, containerd string) (*service, error) {
	inner, err := task.NewTaskService(ctx, publisher, sd)
	if err != nil {
		return nil, err
	}
	runc.Monitor = lastingThreads{runc.Monitor} // set by the line above
	s := &service{
		TTRPCTaskService: inner,
		publisher:        publisher,
		containerd:       containerd,
		address:          ownAddress(),
		containers:       map[string]*container{},
	}
	sd.RegisterCallback(func(ctx context.Context) error {
		s.abortAll(ctx)
		return nil
	})
	return s, nil
}

// RegisterTTRPC implements containerd's shim.TTRPCService.
func (s *service) RegisterTTRPC(server *ttrpc.Server) error {
	taskAPI.RegisterTTRPCTaskService(server, s)
	memberAPI.RegisterMemberService(server, memberService{s})
	return nil
}

func (s *service) get(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[id]
	if c == nil {
		return nil, errgrpc.ToGRPCf(errdefs.ErrNotFound, "container %s is not in this shim", id)
	}
	return c, nil
}

// Create makes the container; if its rootfs carries a checkpoint it is made
// ready to be restored by Start.
func (s *service) Create(ctx context.Context, r *taskAPI.CreateTaskRequest) (_ *taskAPI.CreateTaskResponse, retErr error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if err := privateRuncRoot(r); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	c := &container{id: r.ID, ns: ns, bundle: r.Bundle, runcRoot: runcRoot(r, ns), storage: storageOf(r.Rootfs), gate: semaphore.NewWeighted(gateWidth)}
	annotations, err := readAnnotations(r.Bundle)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if r.Checkpoint == "" && annotations[annotation.Restore] != "false" {
		if dirs := c.storage.checkpoints(); len(dirs) > 0 {
			if c.restore, err = prepareRestore(ctx, c, r, dirs, annotations); err != nil {
				return nil, errgrpc.ToGRPC(fmt.Errorf("restore container %s from its image: %w", r.ID, err))
			}
			defer func() {
				if retErr != nil {
					c.restore.close()
				}
			}()
			if annotations, err = readAnnotations(r.Bundle); err != nil {
				return nil, errgrpc.ToGRPC(err)
			}
		}
	}
	c.group = groupOf(annotations)
	if c.name = annotations[oci.AnnotationMember]; c.name == "" {
		c.name = r.ID
	}
	if err := journal.Write(journal.Dir(), s.record(c)); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	defer func() {
		if retErr != nil {
			_ = journal.RemoveMember(journal.Dir(), c.ns, c.id)
		}
	}()
	resp, err := s.TTRPCTaskService.Create(ctx, r)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.containers[r.ID] = c
	s.mu.Unlock()
	return resp, nil
}

func (s *service) record(c *container) *journal.Member {
	m := &journal.Member{
		ID: c.id, Namespace: c.ns, Containerd: s.containerd, Address: s.address,
		Shim: journal.Self(), Bundle: c.bundle, Group: c.group, Name: c.name,
	}
	if c.restore != nil {
		m.Netns = c.restore.netns
	}
	return m
}

// Start starts or restores the container's init, or an exec.
func (s *service) Start(ctx context.Context, r *taskAPI.StartRequest) (*taskAPI.StartResponse, error) {
	c, err := s.get(r.ID)
	if err != nil {
		return nil, err
	}
	if r.ExecID != "" {
		return whileRunning(s, ctx, r.ID, s.TTRPCTaskService.Start, r)
	}
	if c.restore == nil || !c.restore.begun.CompareAndSwap(false, true) {
		return s.TTRPCTaskService.Start(ctx, r)
	}
	resp, err := s.TTRPCTaskService.Start(ctx, r)
	if err != nil {
		c.endHalfRestored(ctx)
		c.restore.failed(err)
		return nil, errgrpc.ToGRPC(c.restore.explain(errgrpc.ToNative(err)))
	}
	if err := c.restore.started(ctx, int(resp.Pid)); err != nil {
		log.G(ctx).WithError(err).WithField("id", c.id).Warn("after restore")
	}
	s.adoptCgroup(ctx, c, int(resp.Pid))
	return resp, nil
}

// endHalfRestored kills a container whose restore failed behind CRIU, such as at
// the streams of a client that has gone: the stock service knows nothing of its
// processes, and could neither stop nor delete it.
func (c *container) endHalfRestored(ctx context.Context) {
	rc, err := criu.LoadContainer(c.runcRoot, c.id)
	if err != nil {
		return // as it mostly is: nothing was made
	}
	if p := (journal.Proc{Pid: rc.InitPid, Start: rc.InitStart}); p.Pid > 0 && p.Alive() {
		log.G(ctx).WithField("id", c.id).WithField("pid", p.Pid).Warn("killing what a failed restore has left running")
		_ = unix.Kill(p.Pid, unix.SIGKILL)
	}
}

// adoptCgroup makes stats and OOM events work for a restored container, whose
// cgroup did not exist when the stock service created it.
func (s *service) adoptCgroup(ctx context.Context, c *container, pid int) {
	c.cgMu.Lock()
	defer c.cgMu.Unlock()
	if cgroups.Mode() == cgroups.Unified {
		path, err := cgroupsv2.PidGroupPath(pid)
		if err == nil {
			if cg, err := cgroupsv2.Load(path); err == nil {
				c.cgroup = cg
			}
		}
		return
	}
	cg, err := cgroup1.Load(cgroup1.PidPath(pid))
	if err != nil {
		log.G(ctx).WithError(err).WithField("id", c.id).Warn("load cgroup of restored container")
		return
	}
	c.cgroup = cg
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.oom1 == nil {
		if s.oom1, err = oomv1.New(s.publisher); err != nil {
			log.G(ctx).WithError(err).Warn("watch out-of-memory events of restored containers")
			return
		}
		go s.oom1.Run(context.WithoutCancel(ctx))
	}
	if err := s.oom1.Add(c.id, cg); err != nil {
		log.G(ctx).WithError(err).WithField("id", c.id).Warn("watch out-of-memory events")
	}
}

// Stats of the container's cgroup.
func (s *service) Stats(ctx context.Context, r *taskAPI.StatsRequest) (*taskAPI.StatsResponse, error) {
	c, err := s.get(r.ID)
	if err != nil {
		return nil, err
	}
	c.cgMu.Lock()
	cg := c.cgroup
	c.cgMu.Unlock()
	var stats any
	switch cg := cg.(type) {
	case cgroup1.Cgroup:
		stats, err = cg.Stat(cgroup1.IgnoreNotExist)
	case *cgroupsv2.Manager:
		stats, err = cg.Stat()
	default:
		return s.TTRPCTaskService.Stats(ctx, r)
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	data, err := typeurl.MarshalAnyToProto(stats)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &taskAPI.StatsResponse{Stats: data}, nil
}

// Delete removes an exec, or the container and what the shim kept for it.
func (s *service) Delete(ctx context.Context, r *taskAPI.DeleteRequest) (*taskAPI.DeleteResponse, error) {
	c, err := s.get(r.ID)
	if err != nil {
		return nil, err
	}
	if r.ExecID == "" {
		s.abortOpen(ctx, c)
	}
	resp, err := s.TTRPCTaskService.Delete(ctx, r)
	if err != nil || r.ExecID != "" {
		return resp, err
	}
	s.mu.Lock()
	delete(s.containers, r.ID)
	s.mu.Unlock()
	if c.restore != nil {
		c.restore.close()
	}
	if err := journal.RemoveMember(journal.Dir(), c.ns, c.id); err != nil {
		log.G(ctx).WithError(err).Warn("delete container")
	}
	return resp, nil
}

// whileRunning runs f when no checkpoint holds the container frozen.
func whileRunning[R, A any](s *service, ctx context.Context, id string, f func(context.Context, R) (A, error), r R) (A, error) {
	c, err := s.get(id)
	if err != nil {
		var none A
		return none, err
	}
	if err := c.gate.Acquire(ctx, 1); err != nil {
		var none A
		return none, errgrpc.ToGRPC(fmt.Errorf("wait for the checkpoint of container %s in progress: %w", id, err))
	}
	defer c.gate.Release(1)
	return f(ctx, r)
}

// Pause waits for a checkpoint in progress: its freeze is not the user's.
func (s *service) Pause(ctx context.Context, r *taskAPI.PauseRequest) (*ptypes.Empty, error) {
	return whileRunning(s, ctx, r.ID, s.TTRPCTaskService.Pause, r)
}

// Resume waits for a checkpoint in progress, so that it cannot break the barrier.
func (s *service) Resume(ctx context.Context, r *taskAPI.ResumeRequest) (*ptypes.Empty, error) {
	return whileRunning(s, ctx, r.ID, s.TTRPCTaskService.Resume, r)
}

// Update waits for a checkpoint in progress: runc freezes a container to
// update its devices, and thaws it afterwards.
func (s *service) Update(ctx context.Context, r *taskAPI.UpdateTaskRequest) (*ptypes.Empty, error) {
	return whileRunning(s, ctx, r.ID, s.TTRPCTaskService.Update, r)
}

// Checkpoint is the stock single-container checkpoint.
func (s *service) Checkpoint(ctx context.Context, r *taskAPI.CheckpointTaskRequest) (*ptypes.Empty, error) {
	return whileRunning(s, ctx, r.ID, s.TTRPCTaskService.Checkpoint, r)
}

// privateRuncRoot keeps the containers of an instance with a state directory of
// its own apart from the host's: runc's default root is shared by all containerds,
// and ids need only be unique within one.
func privateRuncRoot(r *taskAPI.CreateTaskRequest) error {
	if journal.Dir() == journal.DefaultDir {
		return nil
	}
	opts := &options.Options{}
	if r.Options.GetValue() != nil {
		v, err := typeurl.UnmarshalAny(r.Options)
		if err != nil {
			return err
		}
		o, ok := v.(*options.Options)
		if !ok {
			return nil // not runc's; the stock service says so
		}
		opts = o
	}
	if opts.Root != "" {
		return nil
	}
	opts.Root = filepath.Join(journal.Dir(), "runc")
	var err error
	r.Options, err = typeurl.MarshalAnyToProto(opts)
	return err
}

// runcRoot is where runc keeps the state of the namespace's containers.
func runcRoot(r *taskAPI.CreateTaskRequest, ns string) string {
	root := process.RuncRoot
	if v, err := typeurl.UnmarshalAny(r.Options); r.Options.GetValue() != nil && err == nil {
		if o, ok := v.(*options.Options); ok && o.Root != "" {
			root = o.Root
		}
	}
	return filepath.Join(root, ns)
}
