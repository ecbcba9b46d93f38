// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"google.golang.org/protobuf/proto"

	"github.com/cohort-project/cohort/api/annotation"
	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	"github.com/cohort-project/cohort/runtime/group"
	"github.com/cohort-project/cohort/runtime/journal"
)

// memberService is the Member service of the same containers; two of its calls
// are named as calls of the Task service.
type memberService struct{ *service }

var _ memberAPI.MemberService = memberService{}

// Prepare implements the Member service.
func (s memberService) Prepare(ctx context.Context, r *memberAPI.PrepareRequest) (*memberAPI.PrepareResponse, error) {
	c, err := s.get(r.Id)
	if err != nil {
		return nil, err
	}
	if len(r.Epoch) != 32 {
		return nil, errgrpc.ToGRPCf(errdefs.ErrInvalidArgument, "epoch %q is not 32 hex digits", r.Epoch)
	}
	e := group.Epoch{ID: r.Epoch, Group: r.Group, Number: r.Number, Stop: r.Stop, Lease: time.Duration(r.LeaseMs) * time.Millisecond}
	if e.Lease <= 0 {
		e.Lease = defaultLease
	}
	resp := &memberAPI.PrepareResponse{}
	err = reply(resp)(c.participant().Open(ctx, e, func(ctx context.Context) ([]byte, error) {
		st, err := s.State(ctx, &taskAPI.StateRequest{ID: c.id})
		if err != nil {
			return nil, err
		}
		if st.Status != task.Status_RUNNING {
			return nil, fmt.Errorf("container %s is %s, not running: %w", c.id, task.Status_name[int32(st.Status)], errdefs.ErrFailedPrecondition)
		}
		a := c.newActs(r)
		if err := a.prepare(a.paced(ctx), int(st.Pid)); err != nil {
			return nil, errors.Join(err, a.undoPrepare(context.WithoutCancel(ctx)))
		}
		in, err := s.Inspect(ctx, &memberAPI.InspectRequest{Id: c.id})
		if err == nil {
			a.processes = in.Processes
		}
		return proto.Marshal(&memberAPI.PrepareResponse{CaptureDir: a.dir, Processes: uint32(len(a.processes))})
	}))
	return resp, err
}

// Freeze implements the Member service.
func (s memberService) Freeze(ctx context.Context, r *memberAPI.FreezeRequest) (*memberAPI.FreezeResponse, error) {
	resp := &memberAPI.FreezeResponse{}
	return resp, s.do(ctx, &memberAPI.EpochRequest{Id: r.Id, Epoch: r.Epoch}, group.Frozen, resp, func(ctx context.Context, a *acts) (proto.Message, error) {
		asked, frozen, err := a.freeze(ctx, r.AtNs)
		return &memberAPI.FreezeResponse{AskedNs: asked, FrozenNs: frozen}, err
	})
}

// Lock implements the Member service.
func (s memberService) Lock(ctx context.Context, r *memberAPI.EpochRequest) (*memberAPI.EpochResponse, error) {
	return &memberAPI.EpochResponse{}, s.do(ctx, r, group.Locked, nil, func(_ context.Context, a *acts) (proto.Message, error) {
		return nil, a.lock()
	})
}

// Capture implements the Member service.
func (s memberService) Capture(ctx context.Context, r *memberAPI.EpochRequest) (*memberAPI.CaptureResponse, error) {
	resp := &memberAPI.CaptureResponse{}
	return resp, s.do(ctx, r, group.Captured, resp, func(ctx context.Context, a *acts) (proto.Message, error) {
		if err := a.capture(ctx); err != nil {
			return nil, err
		}
		return &memberAPI.CaptureResponse{PartsNs: a.parts}, nil
	})
}

// Unlock implements the Member service.
func (s memberService) Unlock(ctx context.Context, r *memberAPI.EpochRequest) (*memberAPI.EpochResponse, error) {
	return &memberAPI.EpochResponse{}, s.do(ctx, r, group.Unlocked, nil, func(_ context.Context, a *acts) (proto.Message, error) {
		return nil, a.unlock()
	})
}

// Resume implements the Member service.
func (s memberService) Resume(ctx context.Context, r *memberAPI.ResumeRequest) (*memberAPI.ResumeResponse, error) {
	state := group.Resumed
	if r.Stop {
		state = group.Stopped
	}
	resp := &memberAPI.ResumeResponse{}
	return resp, s.do(ctx, &memberAPI.EpochRequest{Id: r.Id, Epoch: r.Epoch}, state, resp, func(ctx context.Context, a *acts) (proto.Message, error) {
		act := a.resume
		if r.Stop {
			act = a.stop
		}
		at, err := act(ctx)
		if err != nil {
			return nil, err
		}
		a.openGate()
		return &memberAPI.ResumeResponse{ResumedNs: at}, nil
	})
}

// Seal implements the Member service.
func (s memberService) Seal(ctx context.Context, r *memberAPI.EpochRequest) (*memberAPI.SealResponse, error) {
	resp := &memberAPI.SealResponse{}
	return resp, s.do(ctx, r, group.Sealed, resp, func(ctx context.Context, a *acts) (proto.Message, error) {
		return a.seal(a.paced(ctx))
	})
}

// Finish implements the Member service.
func (s memberService) Finish(ctx context.Context, r *memberAPI.EpochRequest) (*memberAPI.EpochResponse, error) {
	c, err := s.get(r.Id)
	if err != nil {
		return nil, err
	}
	return &memberAPI.EpochResponse{}, toGRPC(c.participant().Finish(ctx, r.Epoch))
}

// Abort implements the Member service.
func (s memberService) Abort(ctx context.Context, r *memberAPI.EpochRequest) (*memberAPI.EpochResponse, error) {
	c, err := s.get(r.Id)
	if err != nil {
		return nil, err
	}
	return &memberAPI.EpochResponse{}, toGRPC(c.participant().Abort(ctx, r.Epoch))
}

// Renew implements the Member service.
func (s memberService) Renew(ctx context.Context, r *memberAPI.EpochRequest) (*memberAPI.EpochResponse, error) {
	c, err := s.get(r.Id)
	if err != nil {
		return nil, err
	}
	if err := c.participant().Renew(r.Epoch); err != nil {
		return nil, toGRPC(err)
	}
	if a := c.acts(); a != nil {
		if err := a.renewStorage(ctx); err != nil {
			// Take or Seal will fail if the capture is gone; the member is as alive as before.
			log.G(ctx).WithError(err).WithField("id", c.id).Debug("renew storage capture")
		}
	}
	return &memberAPI.EpochResponse{}, nil
}

// do carries out one act of the open epoch through the participant.
func (s *service) do(ctx context.Context, r *memberAPI.EpochRequest, state group.State, resp proto.Message, act func(context.Context, *acts) (proto.Message, error)) error {
	c, err := s.get(r.Id)
	if err != nil {
		return err
	}
	return reply(resp)(c.participant().Do(ctx, r.Epoch, state, func(ctx context.Context) ([]byte, error) {
		a := c.acts()
		if a == nil {
			return nil, fmt.Errorf("no epoch is open for container %s: %w", c.id, group.ErrRefused)
		}
		m, err := act(ctx, a)
		if err != nil || m == nil {
			return nil, err
		}
		return proto.Marshal(m)
	}))
}

// reply decodes what an act answered, now or when it was first done.
func reply(into proto.Message) func([]byte, error) error {
	return func(b []byte, err error) error {
		if err != nil {
			return toGRPC(err)
		}
		if into == nil || len(b) == 0 {
			return nil
		}
		return toGRPC(proto.Unmarshal(b, into))
	}
}

// toGRPC gives group's refusal its class on the wire.
func toGRPC(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, group.ErrRefused) {
		return errgrpc.ToGRPCf(errdefs.ErrFailedPrecondition, "%v", err)
	}
	return errgrpc.ToGRPC(err)
}

// participant makes the container's protocol state at its first use.
func (c *container) participant() *group.Participant {
	c.epochMu.Lock()
	defer c.epochMu.Unlock()
	if c.part == nil {
		c.part, _ = group.NewParticipant(group.Host{Save: c.save, Undo: c.undo, UndoLimit: undoTimeout}, nil)
	}
	return c.part
}

func (c *container) acts() *acts {
	c.epochMu.Lock()
	defer c.epochMu.Unlock()
	return c.epoch
}

func (c *container) newActs(r *memberAPI.PrepareRequest) *acts {
	a := &acts{c: c, req: r, parts: map[string]int64{}}
	c.epochMu.Lock()
	defer c.epochMu.Unlock()
	c.epoch = a
	return a
}

// save keeps the participant's record on disk, together with what an undo by
// somebody else needs to know. An idle member has no record.
func (c *container) save(state []byte) error {
	var l group.Ledger
	if err := json.Unmarshal(state, &l); err != nil {
		return err
	}
	c.recMu.Lock()
	defer c.recMu.Unlock()
	if l.Epoch.ID == "" && len(l.Undo) == 0 {
		c.rec = nil
		if a := c.acts(); a != nil {
			a.closeStorage()
		}
		return journal.RemoveEpoch(journal.Dir(), c.ns, c.id)
	}
	if c.rec == nil || c.rec.Epoch != l.Epoch.ID {
		c.rec = &journal.Epoch{ID: c.id, Namespace: c.ns, Epoch: l.Epoch.ID, Shim: journal.Self()}
	}
	c.rec.State = state
	return journal.Write(journal.Dir(), c.rec)
}

// note changes the record and writes it.
func (c *container) note(f func(*journal.Epoch)) error {
	c.recMu.Lock()
	defer c.recMu.Unlock()
	if c.rec == nil {
		return errors.New("no epoch record is open")
	}
	f(c.rec)
	return journal.Write(journal.Dir(), c.rec)
}

// undo carries out one step for the participant.
func (c *container) undo(ctx context.Context, e group.Epoch, step group.Step) error {
	a := c.acts()
	if a == nil || a.req.Epoch != e.ID {
		return nil // Prepare failed before it did anything
	}
	switch step {
	case group.EndDump:
		return a.cancelDump(ctx)
	case group.Kill:
		_, err := a.stop(ctx)
		return err
	case group.RemoveRules:
		return a.unlock()
	case group.Thaw:
		if a.fz == nil {
			return nil
		}
		_, err := a.resume(ctx)
		return err
	case group.StopTracking:
		err := a.tidy()
		a.openGate()
		return err
	case group.Discard:
		a.c.dropKept(e.ID)
		return a.discard(ctx)
	}
	return fmt.Errorf("unknown undo step %q", step)
}

// abortOpen ends an open epoch of a container that is going away.
func (s *service) abortOpen(ctx context.Context, c *container) {
	c.epochMu.Lock()
	p := c.part
	c.epochMu.Unlock()
	if p == nil {
		return
	}
	if err := p.Lapse(ctx); err != nil {
		log.G(ctx).WithError(err).WithField("id", c.id).Error("end the open epoch of a container that goes away")
	}
	p.Close()
	c.dropKept("")
}

// abortAll ends the open epochs of all containers: the shim is going away.
func (s *service) abortAll(ctx context.Context) {
	s.mu.Lock()
	var all []*container
	for _, c := range s.containers {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		s.abortOpen(ctx, c)
	}
}

// AwaitRestored implements the Member service.
func (s memberService) AwaitRestored(ctx context.Context, r *memberAPI.RestoreRequest) (*memberAPI.RestoreResponse, error) {
	x, err := s.held(r.Id)
	if err != nil {
		return nil, err
	}
	x.renew(time.Duration(r.LeaseMs) * time.Millisecond)
	if err := x.hold.await(ctx); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("container %s: %w", r.Id, err))
	}
	return &memberAPI.RestoreResponse{}, nil
}

// ReleaseRestored implements the Member service.
func (s memberService) ReleaseRestored(_ context.Context, r *memberAPI.RestoreRequest) (*memberAPI.RestoreResponse, error) {
	x, err := s.held(r.Id)
	if err != nil {
		return nil, err
	}
	x.hold.decide(!r.Abort)
	return &memberAPI.RestoreResponse{}, nil
}

// OpenRestored implements the Member service.
func (s memberService) OpenRestored(_ context.Context, r *memberAPI.RestoreRequest) (*memberAPI.RestoreResponse, error) {
	c, err := s.get(r.Id)
	if err != nil {
		return nil, err
	}
	if c.restore == nil {
		return nil, errgrpc.ToGRPCf(errdefs.ErrFailedPrecondition, "container %s was not restored", r.Id)
	}
	if err := c.restore.openNetwork(); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("open the network of container %s: %w", r.Id, err))
	}
	return &memberAPI.RestoreResponse{Notes: c.restore.notes}, nil
}

func (s *service) held(id string) (*restore, error) {
	c, err := s.get(id)
	if err != nil {
		return nil, err
	}
	if c.restore == nil || !c.restore.coordinated {
		return nil, errgrpc.ToGRPCf(errdefs.ErrFailedPrecondition, "container %s is not being restored with %s", id, annotation.Hold)
	}
	return c.restore, nil
}
